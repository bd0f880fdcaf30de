"""Do running margins foretell loops and rising loss: margins, loops, statistics, then a study."""

import csv
import gzip

import numpy as np
import pytest
from scipy import stats

from probattn.inference import generate
from probattn.inference.evaluation.attention_stages import stage_margins, stages
from tests.support.numpy_llama import NumpyLlama, jacobian
from tests.support.project import ROOT, scripts_fixture
from tests.support.tiny_decoder import imported
from tests.support.tiny_run import log_softmax, tiny_text

FOLDER = ROOT / "examples" / "decoding"
NAMES = (
    *("decoding_questions", "loops", "sequences", "decoding_tokens"),
    *("foretelling", "decoding_report", "decoding"),
)
COMMITTED = sorted(path.parent for path in FOLDER.glob("results/**/generated.csv.gz"))
ARTICLES = 3


scripts = scripts_fixture(FOLDER, NAMES)


@pytest.fixture(scope="module", name="model")
def model_fixture(tmp_path_factory):
    """A run of a tiny published model, and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("decoding")
    return imported(folder, "smollm", block=256).run, folder


def first_loop(tokens):
    """The beginning of the first loop, by comparing copies of every n-gram at every position."""
    for start in range(len(tokens)):
        for size in range(4, len(tokens)):
            copies = [tuple(tokens[start + n * size : start + (n + 1) * size]) for n in range(3)]
            if len(copies[2]) == size and copies[0] == copies[1] == copies[2]:
                return start
    return -1


def test_a_loop_begins_where_three_copies_do(scripts):
    loop_start, rng = scripts["loops"].loop_start, np.random.default_rng(0)
    found = []
    for _ in range(60):
        tokens = rng.integers(0, 50, 60)
        size, start = rng.integers(2, 12), rng.integers(0, 30)
        tokens[start : start + 3 * size] = np.tile(tokens[start : start + size], 3)
        assert loop_start(tokens) == first_loop(tokens)
        found.append(loop_start(tokens))
    assert -1 in found  # twice over two or three tokens is no loop yet
    assert len(set(found)) > 10
    assert loop_start(np.arange(40)) == -1
    assert loop_start(np.r_[1, 2, np.full(12, 7)]) == 2
    assert loop_start(np.r_[1, 2, np.full(11, 7)]) == -1


def test_repeated_n_grams_are_those_that_stood_before(scripts):
    tokens = np.random.default_rng(1).integers(0, 3, 90)
    grams = [tuple(tokens[end - 3 : end + 1]) for end in range(3, 90)]
    seen = [gram in grams[:n] for n, gram in enumerate(grams)]
    expected = [0.0] * 3 + [np.mean(seen[max(0, end - 34) : end - 2]) for end in range(3, 90)]
    np.testing.assert_allclose(scripts["loops"].repeated_share(tokens), expected, atol=1e-12)


@pytest.fixture(scope="module", name="prompts")
def prompts_fixture(model):
    """Three prompts of 32 tokens, which their text is read as again, as tokens and as text."""
    vocabulary = model[0].vocabulary
    tokens = vocabulary.encode(tiny_text(400, seed=7))[:96].reshape(3, 32)
    texts = [vocabulary.decode(row) for row in tokens]
    for row, text in zip(tokens, texts, strict=True):
        assert list(vocabulary.encode(text)) == list(row)
    return tokens, texts


def test_running_margins_are_those_of_the_whole_text(scripts, model, prompts):
    """Margins of a prefix, of the command and of the whole text, and of differences in float64."""
    (run, _), (inputs, texts) = model, prompts
    made = generate(run, texts[1], length=24, temperature=0)
    continuations = scripts["sequences"].continuations
    tokens = continuations(run, inputs[1:2], np.array([1]), temperature=0.0, seed=0)[:, :56]
    assert run.vocabulary.decode(tokens[0, 32:]) == made.text
    heads = list(stages(run, None))
    whole = np.array([stage_margins(run, stage, tokens).margin[0] for stage in heads])
    running = np.array(
        [
            [stage_margins(run, stage, tokens[:, : end + 1]).margin[0, -1] for stage in heads[:2]]
            for end in range(32, 56, 6)
        ]
    )
    np.testing.assert_allclose(running.T, whole[:2, 32::6], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(made.margin, whole.min(0)[32:], rtol=2e-5, atol=2e-6)
    oracle = NumpyLlama(run.checkpoint.config, dict(run.checkpoint.tensors))
    n, residuals = oracle.first_stage(tokens[0])
    last = tokens.shape[1] - 1
    for margin, residual in zip(whole[:, last], residuals, strict=True):
        block = jacobian(lambda token, f=residual: f(token, last), n[last])
        assert abs(margin) == pytest.approx(np.linalg.svd(block)[1][-1], abs=2e-4)


def test_continuations_are_those_of_generation_whatever_else_is_continued(scripts, model, prompts):
    run, (tokens, texts) = model[0], prompts
    continuations = scripts["sequences"].continuations
    greedy = continuations(run, tokens, np.arange(3), temperature=0.0, seed=0)
    made = generate(run, texts[1], length=200, temperature=0)
    assert run.vocabulary.decode(greedy[1, 32:232]) == made.text
    drawn = continuations(run, tokens, np.arange(3), temperature=0.7, seed=0)
    alone = continuations(run, tokens[1:2], np.array([1]), temperature=0.7, seed=0)
    other = continuations(run, tokens[1:2], np.array([1]), temperature=0.7, seed=5)
    np.testing.assert_array_equal(drawn[1], alone[0])
    assert (drawn[1] != other[0]).any()
    # The log probability of a draw has expectation minus the entropy.
    excess = variance = 0.0
    for row in drawn:
        scores = run.network.logits(run.parameters, run.network.embed(run.parameters, row[None]))
        log_p = log_softmax(np.asarray(scores[0, 31:-1], float) / 0.7)
        mean = (np.exp(log_p) * log_p).sum(-1)
        excess += (log_p[np.arange(len(log_p)), row[32:]] - mean).sum()
        variance += (np.exp(log_p) * (log_p - mean[:, None]) ** 2).sum()
    assert abs(excess) < 3 * np.sqrt(variance)


def tables(rng, articles=5):
    """Random tables of tokens, generated and of a text, in the layout of a study."""

    def table(rows, length):
        shape = (rows, length)
        columns = {
            "article": np.broadcast_to(np.arange(rows)[:, None] % articles, shape),
            "position": np.broadcast_to(2 + np.arange(length), shape),
            **{f"margin_head_{n}": rng.normal(size=shape) for n in (1, 2, 3)},
            **{n: rng.random(shape) for n in ("loss", "entropy", "probability", "repeated")},
        }
        return columns

    generated, text = table(2 * articles, 222), table(articles, 254)
    starts = rng.integers(20, 260, 2 * articles)
    starts[3] = -1
    generated["loop"] = np.broadcast_to(starts[:, None], generated["position"].shape)
    generated["temperature"] = np.repeat([0.0, 0.7], articles)[:, None] * np.ones(222)
    return generated, text


def flat(table):
    return {name: np.asarray(values, float).ravel() for name, values in table.items()}


def test_the_questions_are_those_of_the_page(scripts):
    generated, text = tables(np.random.default_rng(2))
    asked = scripts["foretelling"].questions(flat(generated), flat(text), seed=0)
    greedy, drawn, rising = asked
    assert [each.name for each in (greedy, drawn, rising)] == [
        "loop_greedy",
        "loop_0.7",
        "rising_loss",
    ]
    worst = np.min([generated[f"margin_head_{n}"] for n in (1, 2, 3)], axis=0)
    for question, rows in ((greedy, range(5)), (drawn, range(5, 10))):
        expected = []
        for row in rows:
            loop = generated["loop"][row, 0]
            end = 224 if loop < 0 else min(loop, 224)
            for place in range(29, end - 2):  # of the rows, which begin at position 2
                inside = slice(max(0, place - 31), place + 1)
                expected.append(
                    (
                        row % 5,
                        bool(loop >= 0 and loop - (place + 2) <= 32),
                        -worst[row, place],
                        -worst[row, inside].mean(),
                        -worst[row, inside].min(),
                        generated["entropy"][row, inside].mean(),
                    )
                )
        columns = [np.array(each) for each in zip(*expected, strict=True)]
        np.testing.assert_array_equal(question.article, columns[0])
        np.testing.assert_array_equal(question.positive, columns[1])
        names = ("margin_worst", "margin_worst_mean", "margin_worst_least", "entropy_mean")
        for name, values in zip(names, columns[2:], strict=True):
            np.testing.assert_allclose(question.predictors[name], values, atol=1e-9)
    loss = text["loss"]
    amounts = np.array(
        [
            loss[row, at + 1 : at + 33].mean() - loss[row, at - 31 : at + 1].mean()
            for row in range(5)
            for at in range(31, 254 - 32)
        ]
    )
    np.testing.assert_allclose(rising.amount, amounts, atol=1e-9)
    assert rising.positive.mean() == pytest.approx(0.1, abs=2e-3)
    shuffled = -rising.predictors["permuted_margin_worst"]
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(-rising.predictors["margin_worst"]))


def test_answers_are_those_of_scipy(scripts):
    generated, text = tables(np.random.default_rng(3))
    *_, rising = scripts["foretelling"].questions(flat(generated), flat(text), seed=0)
    found = scripts["foretelling"].answers(rising, resamples=200, seed=0)
    by_name = {each.predictor: each for each in found}
    for name, values in rising.predictors.items():
        u = stats.mannwhitneyu(values[rising.positive], values[~rising.positive]).statistic
        pairs = rising.positive.sum() * (~rising.positive).sum()
        each = by_name[name]
        assert each.auc.value == pytest.approx(u / pairs, abs=1e-12)
        assert each.rank_correlation.value == pytest.approx(
            stats.spearmanr(values, rising.amount).statistic, abs=1e-12
        )
        assert each.auc.low <= each.auc.value <= each.auc.high
    best = max(abs(by_name[name].auc.value - 0.5) for name in scripts["decoding_questions"].RIVALS)
    margin = by_name["margin_worst"]
    assert margin.beyond.value == pytest.approx(abs(margin.auc.value - 0.5) - best)
    assert np.isnan(by_name["entropy"].beyond.value)
    assert margin.articles == 5


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
@pytest.mark.slow
def test_the_committed_table_is_that_of_the_committed_tokens(scripts, folder, tmp_path):
    for name in ("generated.csv.gz", "text.csv.gz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    scripts["decoding_report"].summarise(tmp_path)
    assert (tmp_path / "answers.md").read_text() == (folder / "answers.md").read_text()
    found, committed = (rows_of(each / "table.csv") for each in (tmp_path, folder))
    assert [row[:5] for row in found] == [row[:5] for row in committed]
    for own, theirs in zip(found[1:], committed[1:], strict=True):
        np.testing.assert_allclose(np.array(own[5:], float), np.array(theirs[5:], float), atol=2e-4)
    control = [row for row in committed if row[1].startswith("permuted")]
    assert len(control) == 3
    assert all(abs(float(row[5]) - 0.5) < 0.05 for row in control)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def test_an_interrupted_study_has_the_articles_that_are_finished(scripts, tmp_path):
    module = scripts["decoding"]
    scale = scripts["decoding_questions"].Scale(articles=6, together=2)
    half = module.Study(None, np.zeros((6, 256)), scale, 0, tmp_path)
    for number, name in ((n, name) for n in range(3) for name in ("0.0", "0.7", "text")):
        if (number, name) == (1, "0.7"):
            continue
        length = 256 if name == "text" else 288
        names = ("tokens", "margin_head_1", "margin_worst", "loss", "loop")
        np.savez(half.path(name, number), **{n: np.full((2, length), number) for n in names})
    assert half.finished() == [0, 2]
    paths = list(module.write_tokens(half, tmp_path / "out"))
    generated, text = (scripts["decoding_report"].read_packed(path) for path in paths)
    assert sorted(set(generated["article"])) == sorted(set(text["article"])) == [0, 1, 4, 5]
    np.testing.assert_array_equal(text["loss"], text["article"] // 2)
    assert set(generated["temperature"]) == {0, 0.7}
    assert (generated["position"].min(), generated["position"].max()) == (2, 223)


def study(scripts, run, text, out, *more):
    arguments = ["--run", str(run.path), "--text", str(text), "--out", str(out)]
    return scripts["decoding"].main([*arguments, "--articles", str(ARTICLES), *more])


@pytest.fixture(scope="module", name="studied")
def studied_fixture(scripts, model):
    run, folder = model
    text, out = folder / "articles.txt", folder / "out"
    bodies = [tiny_text(900, seed=seed) for seed in range(ARTICLES)]
    headed = [f" = Title {n} = \n{body}\n" for n, body in enumerate(bodies)]
    text.write_text("".join([" = Short = \nfew\n", *headed]), encoding="utf-8")
    assert study(scripts, run, text, out) == 0
    return run, text, out


@pytest.mark.slow
def test_a_study_holds_what_the_model_says_of_its_tokens(studied):
    run, text, out = studied
    with gzip.open(out / "text.csv.gz", "rt") as stream:
        names = stream.readline().strip().split(",")
        columns = dict(zip(names, np.loadtxt(stream, delimiter=",").T, strict=True))
    body = text.read_text().split(" = Title 1 = ")[1].split(" = Title 2 = ")[0]
    tokens = run.vocabulary.encode(f" = Title 1 = {body}")[:256]
    oracle = NumpyLlama(run.checkpoint.config, dict(run.checkpoint.tensors))
    article = columns["article"] == 1
    np.testing.assert_allclose(columns["loss"][article], oracle.losses(tokens)[1:], rtol=6e-3)
    p = np.exp(log_softmax(oracle.logits(tokens)[2:]))
    np.testing.assert_allclose(columns["probability"][article], p.max(-1), rtol=6e-3)
    np.testing.assert_allclose(columns["entropy"][article], stats.entropy(p, axis=-1), rtol=6e-3)
    with np.load(out / "parts" / "0.0-000.npz") as part:
        tokens, loop = part["tokens"], part["loop"]
    assert tokens.shape == (ARTICLES, 288)
    assert [first_loop(row) for row in tokens] == list(loop[:, 0])
    lines = (out / "answers.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 3
    assert (out / "decoding.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(scripts, studied, capsys):
    run, text, out = studied
    before = (out / "generated.csv.gz").read_bytes()
    lost = out / "parts" / "0.7-000.npz"
    times = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.npz")}
    lost.unlink()
    assert study(scripts, run, text, out) == 0
    assert (out / "generated.csv.gz").read_bytes() == before
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {lost}
    assert study(scripts, run, text, out, "--seed", "1") == 2
    assert "whose seed is '0': expected '1'" in capsys.readouterr().err
    assert study(scripts, run, text, out / "more", "--articles", "9") == 2
    assert "has 3 articles of at least 256 tokens" in capsys.readouterr().err
    assert study(scripts, run, text, out / "more", "--articles", "1") == 2
    assert "--articles: got 1, expected an integer >= 2" in capsys.readouterr().err
    assert scripts["decoding_report"].main([str(out / "more")]) == 2
