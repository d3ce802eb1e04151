"""The notebooks of the documentation run to their end, with outputs of the kinds that they are kept with.

The kinds (text, table, picture) of each cell's outputs are compared, not their content: figures and times differ from
one machine to another.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, execute, outputs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_is_kept_with_its_outputs(file: Path, tmp_path: Path) -> None:
    kept = nbformat.read(file, as_version=4)
    nbformat.validate(kept)
    assert outputs(execute(file, tmp_path)) == outputs(kept)
    assert any("image/png" in kinds for kinds in outputs(kept))
    assert file.stat().st_size < 150_000
