"""The experiment on a residual convnet."""

import numpy as np
import pandas as pd
import pytest

from experiments import convnet

TOY = {"channels": (2, 3), "epochs": 1, "calibration": 16, "stages": 1, "iterations": 1, "curvature": 8}
TOY |= {"gradual_epochs": 1, "sparsities": (0.8,), "costly_sparsities": (0.8,), "seeds": 1, "data": "digits"}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_every_method_at_toy_size(norm, tmp_path, capsys):
    config = convnet.Config(norm=norm, output=tmp_path / "results", **TOY)
    convnet.main(config)
    frame = pd.read_csv(tmp_path / "results" / "results.csv")
    assert len(frame) == 1 + (8 if norm == "batch" else 6)
    assert np.isfinite(frame["test_loss"]).all()
    printed = capsys.readouterr().out
    assert f"residual convnet of (2, 3) channels, {norm} norm" in printed
    assert ("EC, batch statistics" in printed) == (norm == "batch")
    assert (tmp_path / "results" / "accuracy.png").stat().st_size > 10_000
    convnet.main(config)  # finds everything
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "results" / "results.csv"))
    assert capsys.readouterr().out == printed
