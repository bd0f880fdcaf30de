"""The commands that bring published models in and out, and fine-tune them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from probattn.inference.cli import console
from probattn.inference.config_tuning import (
    TUNED_OBJECTIVE,
    PriorConfig,
    TuneConfig,
    TuneFitConfig,
)
from probattn.inference.exchange.export_decoder import export_decoder
from probattn.inference.exchange.import_decoder import import_decoder
from probattn.inference.fitting.fit import fit
from probattn.inference.runs.run import load_fitted
from probattn.models import ObjectiveConfig
from probattn.text.corpora import TextConfig


@dataclass(frozen=True)
class Import:
    """Import a published model: GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma, SmolLM.

    --data is short for --data.source.
    """

    source: tyro.conf.Positional[str]
    """folder with config.json, .safetensors and tokenizer.json; hf:owner/name or
    hf:owner/name@revision; or a .gguf file"""
    out: Path
    """run directory, new or empty unless --overwrite is given"""
    block: int | None = None
    """tokens that are read at once; by default the model's context, but at most 1,024"""
    prior_rank: int = 16
    """rank of the post-hoc attention prior"""
    overwrite: bool = False
    """replace the run in --out"""
    data: TextConfig = field(default_factory=TextConfig)

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        found = import_decoder(
            self.source,
            self.out,
            data=self.data,
            block=self.block,
            prior_rank=self.prior_rank,
            overwrite=self.overwrite,
            progress=True,
        )
        console.print_imported(screen, self.out, found)


@dataclass(frozen=True)
class Tune:
    """Fine-tune a published model under priors centred at its weights.

    Network, tokenizer and block are those of the run that --from names. --data, --objective and
    --guide are short for --data.source, --objective.name and --fit.guide.
    """

    out: Path
    """run directory, new or empty unless --resume or --overwrite is given"""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """run of `probattn import`; with --resume it is known, and is named if it was moved"""
    config: Path | None = None
    """TOML file with the tables data, prior, objective and fit; flags win over it"""
    resume: bool = False
    """continue the run in --out from its latest checkpoint, with its own configuration"""
    overwrite: bool = False
    """replace the run in --out"""
    data: TextConfig = field(default_factory=TextConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    objective: ObjectiveConfig = TUNED_OBJECTIVE
    fit: TuneFitConfig = field(default_factory=TuneFitConfig)

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        config = TuneConfig(self.data, prior=self.prior, objective=self.objective, fit=self.fit)
        result = fit(
            config,
            self.out,
            base=self.start,
            resume=self.resume,
            overwrite=self.overwrite,
            progress=True,
        )
        console.print_fit(screen, self.out, result)


@dataclass(frozen=True)
class Export:
    """Write a run as a folder that transformers loads: config.json, .safetensors, tokenizer.json.

    A fit becomes a GPT-2 whose biases are zero. An imported model is written as it is, and with
    what a fit has changed in it.
    """

    run: tyro.conf.Positional[Path]
    """run directory of a fit or of an imported model"""
    out: Path
    """folder, new or empty"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        console.print_paths(screen, [export_decoder(load_fitted(self.run), self.out)])
