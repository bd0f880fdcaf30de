"""The folder of the study of fragility, and its tables."""

import csv
import gzip

import numpy as np

from tests.support.project import ROOT

FOLDER = ROOT / "examples" / "fragility"


def table_of(path):
    with path.open(encoding="utf-8", newline="") as stream:
        rows = {(row.pop("harm"), row.pop("predictor")): row for row in csv.DictReader(stream)}
    return rows


def tokens_of(path):
    with gzip.open(path, "rt") as stream:
        names = stream.readline().strip().split(",")
        return dict(zip(names, np.loadtxt(stream, delimiter=",").T, strict=True))
