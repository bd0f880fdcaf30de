"""Does a margin predict fragility: predictors and harms against oracles, and tiny studies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.special import softmax

from probattn.inference import load_run
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.evaluation.token_margins import text_margins
from probattn.models.decoder.network import decoder_logits
from tests.support.fragility_tables import FOLDER, table_of, tokens_of
from tests.support.project import scripts_fixture
from tests.support.tiny_decoder import imported
from tests.support.tiny_run import fit_tiny_run, tiny_text

NAMES = (
    *("questions", "sample", "replaced", "predictors", "harms", "passes"),
    *("associations", "summarise", "study"),
)
TOKENS = 160


scripts = scripts_fixture(FOLDER, NAMES)


def test_the_token_constraint_bound_is_that_of_the_dense_jacobian(scripts):
    rng = np.random.default_rng(0)
    table, hidden = rng.normal(size=(9, 4)), rng.normal(size=(5, 4))
    hidden[-1] = 9 * table[2]  # one token has nearly all
    p = softmax(hidden @ table.T, axis=-1)
    jacobian = (p[:, :, None] * np.eye(9) - p[:, :, None] * p[:, None, :]) @ table
    expected = 1 / np.linalg.norm(jacobian, axis=(1, 2))
    bound = scripts["predictors"].token_constraint_bound
    np.testing.assert_allclose(bound(hidden @ table.T, jnp.asarray(table)), expected, rtol=1e-6)
    single = bound(jnp.asarray(hidden @ table.T, jnp.float32), jnp.asarray(table, jnp.float32))
    np.testing.assert_allclose(single, expected, rtol=1e-4)


def study(scripts, run, text, out, *more):
    arguments = ["--run", str(run.path), "--text", str(text), "--out", str(out)]
    return scripts["study"].main([*arguments, "--tokens", str(TOKENS), *more])


@pytest.fixture(scope="module", name="studied")
def studied_fixture(scripts, tmp_path_factory):
    """A tiny published model, the folder of its study, and its table of tokens."""
    folder = tmp_path_factory.mktemp("fragility")
    run = imported(folder / "model").run
    text = folder / "text.txt"
    half = tiny_text(1200, seed=2)
    formula = " = not a heading = \n"
    articles = f" \n = One = \n \n{half}\n \n = Two = \n \n{formula}{half[::-1]}"
    while len(run.vocabulary.encode(articles)) % run.network.block != 1:  # windows that fill it
        articles = articles[:-1]
    text.write_text(articles, encoding="utf-8")
    out = folder / "out"
    assert study(scripts, run, text, out) == 0
    return run, text, out, tokens_of(out / "tokens.csv.gz")


@pytest.mark.slow
def test_a_study_is_a_table_of_numbers_and_what_is_computed_of_it(studied):
    run, text, out, columns = studied
    assert len(columns["loss"]) == TOKENS // run.network.block * (run.network.block - 2)
    assert set(np.unique(columns["document"])) == {1, 2}
    assert columns["type"].min() == 0
    rows = table_of(out / "table.csv")
    assert ("noise_0.25", "permuted_sigma_min_worst") in rows
    assert ("likely_other", "sigma_min_head_1") in rows
    lines = (out / "answers.md").read_text(encoding="utf-8").splitlines()
    harms = {harm for harm, _ in rows}
    signed = {harm for harm in harms if not harm.startswith("abs_")}
    assert harms == signed | {f"abs_{harm}" for harm in signed}
    assert len(lines) == 2 + len(signed)
    expected = stats.spearmanr(columns["loss_slope"], abs(columns["harm_noise_0.5"])).statistic
    found = float(rows["abs_noise_0.5", "loss_slope"]["rank_correlation"])
    assert found == pytest.approx(expected, abs=1e-4)
    assert all(line.count("|") == 9 for line in lines)
    assert (out / "fragility.png").stat().st_size > 1000
    assert "51200 tokens would take" in (out / "setting.txt").read_text()
    shuffled = columns["permuted_sigma_min_worst"]
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(columns["sigma_min_worst"]))
    # Margins are those of the command.
    margins = text_margins(run, text, stride=run.network.block)
    heads = np.array([stage.margin for stage in margins.stages])[:, margins.position >= 2]
    where = columns["window"] == 0
    np.testing.assert_allclose(
        columns["sigma_min_worst"][where], heads.min(0)[: where.sum()], rtol=1e-3
    )


@pytest.mark.slow
def test_answers_without_some_types_are_those_of_the_other_tokens(scripts, studied, capsys):
    *_, out, columns = studied
    main = scripts["summarise"].main
    assert main([str(out), "--without", "0", "1"]) == 0
    lines = (out / "answers_without.md").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith("| noise_0.5 ")]
    left = columns["type"] > 1
    expected = stats.spearmanr(columns["sigma_min_worst"][left], columns["harm_noise_0.5"][left])
    assert line.split(" | ")[1].startswith(f"{expected.statistic:.2f} (".replace("-", "\u2212"))
    capsys.readouterr()
    assert main([str(out), "--without", "9999"]) == 2
    assert "--without: no token is of type 9999" in capsys.readouterr().err


@pytest.mark.slow
def test_harms_are_increases_of_losses(scripts, studied):
    run, text, _, columns = studied
    subject = scripts["sample"].open_subject(
        run, text, scripts["questions"].Scale(TOKENS, draws=2), seed=0
    )
    tokens, _ = text_tokens(run, text)
    scorer = Scorer(run.network, run.vocabulary, tokens, most_tokens=TOKENS)
    clean = scorer.losses(run.parameters)
    shape = clean[:, 2:].shape
    np.testing.assert_allclose(columns["loss"].reshape(shape), clean[:, 2:], rtol=1e-3)
    rounded = scripts["harms"].round_weights(run.parameters, 3, only=("embedding", "layers.0."))
    harm = scorer.losses(dict(rounded))[:, 2:] - clean[:, 2:]
    np.testing.assert_allclose(columns["harm_rounding_first_3"].reshape(shape), harm, atol=5e-3)
    draws = [subject.losses(np.array([0, 1]), Gaussian(0.5 * subject.rms), draw=d) for d in (0, 1)]
    harm = np.mean(draws, axis=0)[:, 2:] - clean[:2, 2:]
    found = columns["harm_noise_0.5"].reshape(shape)[:2]
    np.testing.assert_allclose(found, harm, atol=5e-3)
    assert columns["harm_ascent"].mean() > 0.01


@pytest.mark.slow
def test_a_replaced_token_is_read_with_its_past_and_what_follows(scripts, small_subject):
    subject = small_subject
    inputs, targets = subject.inputs[0], subject.targets[0]
    new = [None] * len(inputs)
    new[3], new[6] = np.array([5, 9]), np.array([7])
    found = scripts["replaced"].losses_after(subject, np.array([0]), [new], 2)[0]
    for at in (3, 6):
        tokens = np.concatenate([inputs[:at], new[at], inputs[at + 1 : at + 4]])
        logits = decoder_logits(subject.parameters, tokens[None], subject.network.config)[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[-4:], jnp.asarray(targets[at : at + 4])
        )
        assert found[at] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert np.isnan(found[[0, 1, 2, 4, 5]]).all()
    ahead = scripts["replaced"].mean_ahead(np.arange(6.0)[None])[0]
    np.testing.assert_array_equal(ahead, [1.5, 2.5, 3.5, np.nan, np.nan, np.nan])


def test_a_misspelling_swaps_two_letters(scripts, small_subject):
    vocabulary, misspelling = small_subject.run.vocabulary, scripts["replaced"].misspelling
    made = {token: misspelling(vocabulary, token, 0) for token in range(vocabulary.size)}
    found = {token: pieces for token, pieces in made.items() if pieces is not None}
    assert found
    for token, pieces in found.items():
        before, after = vocabulary.decode(np.array([token])), vocabulary.decode(pieces)
        assert after != before
        assert sorted(after) == sorted(before)
        assert 1 <= len(pieces) <= 4


@pytest.mark.slow
def test_slopes_and_gradients_are_those_of_differences(scripts, small_subject):
    subject, rows = small_subject, np.array([0, 1])
    x = np.asarray(subject.network.embed(subject.parameters, subject.inputs[rows]), np.float64)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), subject.parameters)

    def losses(moved):
        logits = subject.network.logits(parameters, jnp.asarray(moved))
        targets = jnp.asarray(subject.targets[rows])
        return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    gradient = scripts["predictors"].gradient(subject)(rows)["gradient"]
    step, slopes = 1e-4, np.empty(x.shape[-1])
    for axis in range(x.shape[-1]):
        moved = np.zeros_like(x)
        moved[0, 4, axis] = step
        slopes[axis] = (losses(x + moved) - losses(x - moved)).sum() / (2 * step)
    assert gradient[0, 4] == pytest.approx(np.linalg.norm(slopes), rel=1e-3)
    squares = 0
    for number in range(subject.scale.directions):
        key = jax.random.fold_in(subject.key(1000 + number), 0)
        moved = step * np.asarray(jax.random.normal(key, x.shape, jnp.float32), np.float64)
        squares = squares + ((losses(x + moved) - losses(x - moved)) / (2 * step)) ** 2
    expected = np.sqrt(squares / subject.scale.directions)
    found = scripts["predictors"].loss_slope(subject)(rows)["loss_slope"]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module", name="small_subject")
def small_subject_fixture(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    run = imported(folder / "model").run
    text = folder / "text.txt"
    text.write_text(tiny_text(400), encoding="utf-8")
    scale = scripts["questions"].Scale(64, directions=2)
    return scripts["sample"].open_subject(run, text, scale, seed=0)


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(scripts, studied, monkeypatch):
    run, text, out, _ = studied
    before = (out / "tokens.csv.gz").read_bytes()
    lost = out / "parts" / "noise_0.25-000.npz"
    others = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.npz")}
    lost.unlink()
    assert study(scripts, run, text, out) == 0
    assert (out / "tokens.csv.gz").read_bytes() == before
    kept = {path: path.stat().st_mtime_ns for path in others}
    assert {path for path in others if kept[path] != others[path]} == {lost}


@pytest.mark.slow
def test_parts_of_another_study_and_bad_input_are_refused(scripts, studied, capsys, tmp_path):
    run, text, out, _ = studied
    assert study(scripts, run, text, out, "--seed", "1") == 2
    assert "whose seed is '0': expected '1'" in capsys.readouterr().err
    assert study(scripts, run, text, tmp_path / "other", "--tokens", "0") == 2
    assert "--tokens: got 0, expected an integer >= 1" in capsys.readouterr().err
    (tmp_path / "tokens.csv.gz").write_bytes(b"no table")
    assert scripts["summarise"].main([str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_this_project_has_more_predictors(scripts, tmp_path_factory, tmp_path):
    run = load_run(fit_tiny_run(tmp_path_factory).path)
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(1500, seed=4), encoding="utf-8")
    assert study(scripts, run, text, tmp_path / "out") == 0
    columns = tokens_of(tmp_path / "out" / "tokens.csv.gz")
    for name in ("sigma_min", "embedding_margin", "certified_radius", "gain_share"):
        assert f"{name}_post_hoc" in columns
    assert "harm_misspelt" not in columns  # a character has no letters to swap
    assert len(np.unique(columns["document"])) == len(np.unique(columns["window"]))
    shares = np.bincount(columns["window"].astype(int), columns["gain_share_post_hoc"])
    assert (shares <= 1 + 1e-3).all()
