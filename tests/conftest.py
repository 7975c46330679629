"""What every test shares: one torch thread, seeds, stored numbers."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typecheck

typecheck.install("videoar")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch with which `make golden` writes the stored numbers anew."""
    parser.addoption("--write-golden", action="store_true", help="write the stored numbers anew")


def pytest_configure(config: pytest.Config) -> None:
    """Use one torch thread: tensors are tiny here, and the workers share the cores."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global random state, in whatever order tests run."""
    random.seed(0)
    np.random.seed(0)  # the state that libraries read
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Sequence[float]], None]:
    """Compare numbers with those stored under a name; `--write-golden` stores them instead."""

    def compare(name: str, numbers: Sequence[float]) -> None:
        path = GOLDEN / f"{name}.json"
        if request.config.getoption("--write-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(list(numbers), indent=0) + "\n")
            return
        assert path.is_file(), f"no stored numbers {path.name}: run `make golden` once"
        # Other processors and thread counts add up in another order; a change of method shows.
        np.testing.assert_allclose(numbers, json.loads(path.read_text()), rtol=1e-3, atol=1e-5)

    return compare
