"""Public bugs of exported models: the mode that a model was in is written into the file."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from loop.loop_nets import conv_net, images, sgd, train
from public_bugs.bug import bug
from torch import nn

import bnfix
from bnfix.types import Diagnosis


@bug("BN501", "pytorch/pytorch#151726")
def exported_program_that_can_not_be_put_into_evaluation_mode(fixed: bool) -> Diagnosis:
    """``eval()`` on what comes out of ``torch.export`` raises, or does nothing: it has to be said before."""
    model = conv_net()
    train(model, sgd(model), 40)
    return bnfix.check(torch.export.export(model.train(not fixed), (images(4),)))


def _onnx(model: nn.Module, training: bool) -> Diagnosis:
    pytest.importorskip("onnx")
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that is in use everywhere is called legacy
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images(4),), str(path), dynamo=False, training=mode, do_constant_folding=not training)
        return bnfix.check(path)


@bug("BN502", "pytorch/pytorch#49229")
def exported_to_onnx_in_training_mode(fixed: bool) -> Diagnosis:
    model = conv_net()
    train(model, sgd(model), 40)
    return _onnx(model.train(not fixed), training=not fixed)


@bug("BN502", "pytorch/pytorch#75252")
def norms_without_statistics_are_exported_in_training_mode(fixed: bool) -> Diagnosis:
    """OpenVINO refuses the file: what has no statistics can only be exported as it trains."""
    model = conv_net()
    if not fixed:
        for i in (1, 4):
            model[i] = nn.BatchNorm2d(8, track_running_stats=False)
    train(model, sgd(model), 40)
    return _onnx(model.eval(), training=False)
