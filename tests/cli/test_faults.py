"""benchmarks/faults.py: what users met, reproduced through the command line."""

import importlib.util

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(faults.ENTRIES))
def test_fault(name, tmp_path):
    row = faults.reproduce(name, tmp_path)
    assert row["checks"] and not row["wrong"], "\n".join(row["wrong"])
