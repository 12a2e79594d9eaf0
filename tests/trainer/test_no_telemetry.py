# SPDX-License-Identifier: Apache-2.0
"""Nothing is sent anywhere. TRL sends when the variable CI is not set, so the variable is taken away here."""

import os
import socket

import pytest
import trl.trainer.base_trainer

from tests.trainer.runs import METHODS, logged, make_trainer


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_sends_nothing(method, tmp_path, monkeypatch):
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda *args, **kwargs: sent.append(kwargs))
    monkeypatch.setattr("huggingface_hub.utils.send_telemetry", lambda *args, **kwargs: sent.append(kwargs))

    def refuse(*args, **kwargs):
        sent.append(args)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert "CI" not in os.environ
    trainer = make_trainer(method, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    assert len(logged(trainer, "loss")) == 3 and not sent


def test_trl_would_have_sent(monkeypatch):
    """The seam that is closed above exists: TRL's own method calls this function."""
    code = trl.trainer.base_trainer._BaseTrainer._send_telemetry.__code__
    assert "send_telemetry" in code.co_names
    for method in METHODS:
        assert "send_telemetry" not in method.trainer_class._send_telemetry.__code__.co_names
