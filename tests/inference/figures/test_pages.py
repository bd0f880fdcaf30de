"""Pages of posteriors and of comparisons, and what results show in a notebook."""

import base64
import json
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from probattn.inference import (
    ComparedRun,
    FitResult,
    compare,
    comparison_page,
    posterior_page,
    sensitivity,
    text_margins,
    to_datatree,
)
from probattn.inference.figures import pages
from probattn.inference.figures.pages import check_margins
from probattn.inference.pages.page import Series
from probattn.inference.sampling.posterior_runs import load_posterior, posterior_data
from probattn.models import ObjectiveConfig
from tests.support.tiny_posterior import fitted_by_hand

pytestmark = pytest.mark.slow


def shown_by(path):
    """Data of a page, and a function that reads a column of it in three digits."""
    page = path.read_text("ascii")
    data = json.loads(re.search('id="data">(.*?)</script>', page, re.DOTALL)[1])
    content = np.frombuffer(zlib.decompress(base64.b64decode(data["blobs"][0])), np.uint8)

    def column(series, name):
        place = data["series"][series]["values"][name]
        planes = content[place["at"] :][: place["planes"] * data["count"]]
        codes = sum(
            plane.astype(int) << 8 * rank
            for rank, plane in enumerate(planes.reshape(place["planes"], -1))
        )
        half = (codes - 4) // 2
        size = (half % 900 + 100) * 10.0 ** (half // 900 + place["least"] - 2)
        found = np.where(codes % 2, -size, size)
        return np.select(
            [codes == 0, codes == 1, codes == 2, codes == 3], [np.nan, -np.inf, np.inf, 0], found
        )

    return data, column


def text_of(data):
    place = data["tokens"]
    content = np.frombuffer(zlib.decompress(base64.b64decode(data["blobs"][0])), np.uint8)
    return [data["symbols"][each] for each in content[place["at"] :][: data["count"]]]


def test_the_page_of_a_posterior_has_medians_intervals_and_probabilities(language_run, tmp_path):
    path = posterior_page(language_run, tmp_path / "posterior.html")
    data, column = shown_by(path)
    tree = to_datatree(language_run)
    margin = tree["posterior"]["margin"].values
    support = tree["support_tokens"]["support_probability"].values
    tokens = posterior_data(language_run)[0]
    assert text_of(data) == [
        token for row in tokens for token in language_run.vocabulary.display(row)
    ]
    for name, level in (("low", 0.05), ("margin", 0.5), ("high", 0.95)):
        expected = np.quantile(margin, level, axis=(0, 1)).reshape(-1)
        np.testing.assert_allclose(column(0, name), expected, rtol=6e-3)
    np.testing.assert_allclose(column(0, "support_probability"), support.reshape(-1), rtol=6e-3)
    length = support.shape[1]
    likely = np.arange(0, support.size, length) + support.argmax(1)
    assert data["series"][0]["support"] == likely.tolist()
    assert data["breaks"] == list(range(length, support.size, length))
    assert not data["inText"]
    assert "begins a sequence" in path.read_text("ascii")


def test_the_page_of_a_comparison_has_the_runs_side_by_side(
    tiny_run, language_run, latent_run, tmp_path
):
    compared = compare({"map": tiny_run, "nuts": language_run, "latent": latent_run})
    path = comparison_page(compared, tmp_path / "compared.html")
    data, column = shown_by(path)
    assert [(each["run"], each["stage"]) for each in data["series"]] == [
        ("map", "trained"),
        ("nuts", "trained"),
    ]
    inner = np.array([each % tiny_run.config.model.block >= 2 for each in range(data["count"])])
    smallest = {run.label: run.smallest_margin for run in compared}
    assert column(0, "margin")[inner].min() == pytest.approx(smallest["map"], rel=6e-3)
    draws = to_datatree(load_posterior(language_run))["posterior"]["margin"].values
    median = np.median(draws, axis=(0, 1)).reshape(-1)
    np.testing.assert_allclose(column(1, "margin"), median, rtol=6e-3)
    page = path.read_text("ascii")
    assert "Sequences of other runs are others: latent." in page
    assert f"<td>{compared[0].predictions.bpc:.4g}</td>" in page


def test_a_run_without_draws_has_no_intervals(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="is a MAP run, a point without draws, so its margins"):
        posterior_page(tiny_run, tmp_path / "posterior.html")
    assert list(tmp_path.iterdir()) == []


def test_a_posterior_without_margins_is_refused_before_it_is_drawn(
    tiny_run, language_run, tmp_path, monkeypatch
):
    guide = fitted_by_hand(tiny_run, tmp_path / "run", guide="mean_field", name="ce")
    without = replace(language_run.config, objective=ObjectiveConfig(name="ce"))
    monkeypatch.setattr(pages, "to_datatree", lambda *_, **__: pytest.fail("draws"))
    for run in (guide, replace(language_run, config=without)):
        expected = rf"^{re.escape(str(run.path))}: objective ce has no attention stage, so its post"
        with pytest.raises(ValueError, match=expected):
            posterior_page(run, tmp_path / "posterior.html")
    assert not (tmp_path / "posterior.html").exists()
    with pytest.raises(ValueError, match=r"^--html: objective ce has no attention stage"):
        check_margins(ObjectiveConfig(name="ce"))
    for objective in (None, ObjectiveConfig(name="margin"), ObjectiveConfig(name="full")):
        check_margins(objective)


@pytest.mark.parametrize(
    ("bare", "said"), [(["ce"], "ce has no margins."), (["ce", "d"], "ce and d have no margins.")]
)
def test_runs_without_margins_are_said_to_have_none(bare, said, tmp_path):
    def with_margins(label, text):
        values = {"margin": np.array([1.0, 1.0, 0.5])}
        series = Series(label, "trained", values, np.array([False, False, True]))
        return ComparedRun(label, "language", sequences=(tuple(text),), series=(series,))

    compared = [
        with_margins("map", "abc"),
        *(ComparedRun(label, "language") for label in bare),
        with_margins("latent", "xyz"),
    ]
    page = comparison_page(compared, tmp_path / "compared.html").read_text("ascii")
    assert f"<p>Sequences of other runs are others: latent.</p><p>{said}</p>" in page


def test_a_guide_has_draws(tiny_run, tmp_path):
    run = fitted_by_hand(tiny_run, tmp_path / "run", guide="mean_field")
    data, column = shown_by(posterior_page(run, tmp_path / "guide.html"))
    assert (column(0, "low") <= column(0, "high")).all()
    assert data["count"] == 64 * run.config.model.block


def test_results_show_themselves_in_a_notebook(tiny_run, language_run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the token [/i] of a", encoding="utf-8")
    margins = text_margins(tiny_run, text)
    noise = sensitivity(tiny_run, draws=1, most_tokens=80)
    fitted = FitResult(tiny_run, 1.25, 2.5, tiny_run.metrics(), 0.75)
    posterior = load_posterior(language_run)
    for result, said in (
        (margins, "text.txt: 19 tokens"),
        (noise, "gaussian noise of 0.5"),
        (fitted, ">0.75</td>"),
        (posterior, ">site token_embedding</td>"),
        (tiny_run, ">margin</td>"),
    ):
        shown = result._repr_html_()
        assert said in shown
        assert shown.startswith("<div>")
        assert "<script" not in shown
        assert "<div" not in repr(result)
    assert margins._repr_html_().count("<span ") == 19
    assert margins._repr_html_().count("box-shadow") == int(margins.stages[0].support.sum())
