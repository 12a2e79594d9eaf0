# SPDX-License-Identifier: Apache-2.0
"""The adapter that the documentation writes keeps the contract of all, and its tables of backbones are the code's."""

import inspect
import sys
import types
from typing import Any

import pytest

from tests.adapters import test_contract
from tests.docs.pages import SOURCE, blocks
from trl_sipo.adapters import ADAPTERS

_MODULE = "aura_flow_of_the_documentation"
_FIXTURES = {"case", "tmp_path", "monkeypatch"}

CONTRACT = {
    name: test
    for name, test in vars(test_contract).items()
    if name.startswith("test_") and "case" in (arguments := set(inspect.signature(test).parameters)) <= _FIXTURES
}


@pytest.fixture(scope="module")
def aura_flow():
    """The row of add_a_backbone.md, with its adapter in the table."""
    module: Any = types.ModuleType(_MODULE)
    for block in blocks(SOURCE / "add_a_backbone.md", "python"):
        exec(compile(block.code, str(block), "exec"), module.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, _MODULE, module)
        patch.setitem(ADAPTERS, "AuraFlowPipeline", f"{_MODULE}:AuraFlowAdapter")
        yield module.CASES[0]


@pytest.mark.parametrize("name", CONTRACT)
def test_the_example_adapter_keeps_the_contract(name, aura_flow, request):
    arguments = inspect.signature(CONTRACT[name]).parameters.keys() - {"case"}
    CONTRACT[name](aura_flow, **{argument: request.getfixturevalue(argument) for argument in arguments})


def test_the_contract_is_seen():
    assert len(CONTRACT) > 20
    assert "test_training_gives_the_denoiser_what_inference_gives_it" in CONTRACT
