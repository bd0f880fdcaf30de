"""Import a published model: a run that holds it, to be measured as any other."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from probattn.blocks.promotion import default_promotion
from probattn.inference.config_imported import ImportConfig, ImportedConfig
from probattn.inference.evaluation.scoring import Score, Scorer
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.exchange.exported_tokenizers import published_files
from probattn.inference.exchange.hugging_face_folders import write_folder
from probattn.inference.pretrained.checkpoint import Checkpoint, open_checkpoint
from probattn.inference.runs.checks import with_absolute_paths
from probattn.inference.runs.directory import MODEL
from probattn.inference.runs.folder import check_target
from probattn.inference.runs.opening import new_run, open_run
from probattn.inference.runs.run import ImportedRun
from probattn.inference.runtime.progress import progress_bar
from probattn.text.corpora import TextConfig, load_corpus

SAMPLE = 4096  # tokens of the validation text that are scored at once


@dataclass(frozen=True)
class Imported:
    """What `import_decoder` made.

    Attributes:
        run: the run.
        score: of a sample of its validation text. A model that was damaged on its way predicts
            badly; compare with what its publisher says.
    """

    run: ImportedRun
    score: Score


@default_promotion()
def import_decoder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: TextConfig | None = None,
    block: int | None = None,
    prior_rank: int = 16,
    overwrite: bool = False,
    progress: bool = False,
) -> Imported:
    """Import a published model into a run directory, and score a sample of a text with it.

    The run holds config.json, tokenizer.json and the tensors as they were published, bit by bit; of
    a GGUF file the numbers that its quantised blocks stand for. It also holds the settings of the
    tokenizer and of the generation, and the chat template, where the source has them.

    Args:
        source: a folder as Hugging Face has them, hf:owner/name, or a .gguf file: see
            `pretrained.checkpoint.open_checkpoint`.
        out: run directory, new or empty.
        data: text that the model is measured on, by default Python's own language reference; the
            post-hoc attention prior is fitted to its training part.
        block: tokens that are read at once, at least 3; by default the model's context, but at most
            1,024. Tokens that the tokenizer puts before a text, such as <s>, need room beside them.
        prior_rank: rank of the post-hoc attention prior.
        overwrite: replace the run in `out`.
        progress: show progress bars.

    Raises:
        ValueError: if the source is no model that can be read (PretrainedError), the block is
            longer than its context, the rank larger than its width, the text cannot be read or
            encoded, or `out` holds something else (RunError).
        ImportError: without the libraries of the extra `pretrained`.
    """
    path = Path(out)
    check_target(path, overwrite=overwrite)
    imported = ImportedConfig(str(source), block, prior_rank)
    checkpoint = open_checkpoint(str(source))
    # Both are checked before anything is written.
    tensors, beside = checkpoint.names.shapes, published_files(checkpoint)
    _check(checkpoint, block, prior_rank)
    config = with_absolute_paths(ImportConfig(TextConfig() if data is None else data, imported))
    corpus = load_corpus(config.data)
    run = new_run(ImportedRun, path, config, corpus, checkpoint.tokenizer)
    with progress_bar("import", total=len(tensors), unit="tensor", visible=progress) as bar:

        def write() -> None:
            write_folder(
                path / MODEL,
                checkpoint.config,
                _tensors(checkpoint),
                checkpoint.tokenizer.definition,
                beside,
                done=bar.update,
            )

        with open_run(run, overwrite=overwrite, write=write) as run:
            tokens, _ = text_tokens(run, None)
            score = Scorer(run.network, run.vocabulary, tokens, most_tokens=SAMPLE).score(
                run.parameters
            )
            run.update_summary(imported={"bpc": score.bpc, "cross_entropy": score.cross_entropy})
    return Imported(run, score)


def _check(checkpoint: Checkpoint, block: int | None, prior_rank: int) -> None:
    decoder, before = checkpoint.decoder, len(checkpoint.tokenizer.begins_with)
    if block is not None and block > decoder.context - before:
        less = f" less the {before} that stand before each text" if before else ""
        raise ValueError(
            f"block is {block}: expected at most {decoder.context - before}, the context of "
            f"{checkpoint.source}{less}"
        )
    if prior_rank > decoder.width:
        raise ValueError(
            f"prior_rank is {prior_rank}: expected at most {decoder.width}, the width of "
            f"{checkpoint.source}"
        )


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray]]:
    for name in checkpoint.names.shapes:
        yield name, checkpoint.tensors[name]
