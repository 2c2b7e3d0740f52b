"""A checkpoint to damage."""

import shutil

import pytest

from tests.unit import golden


@pytest.fixture
def copy(tmp_path):
    """Copies a golden checkpoint to a directory of the test's own."""

    def copy_checkpoint(name="k2_thinking"):
        return shutil.copytree(golden.checkpoint_directory(name), tmp_path / name)

    return copy_checkpoint
