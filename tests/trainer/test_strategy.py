# SPDX-License-Identifier: Apache-2.0
"""The strategy in force is said at the start, and is the one that was asked for, or the run ends."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from tests.trainer import strategy_run
from tests.trainer.processes import ROOT, run_ranks
from tests.trainer.runs import DPO, make_trainer
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer import strategy
from trl_sipo.trainer.launcher import environment_before_launch
from trl_sipo.trainer.strategy import Strategy, check_prepared, check_strategy, launched_processes, strategy_in_force

# What a launcher leaves in the environment, and what is said where Accelerate runs one process in float32.
REFUSED = {
    "torchrun": ({"WORLD_SIZE": "2"}, "2 copies of the run"),
    "srun": ({"SLURM_STEP_NUM_TASKS": "8"}, "8 copies of the run"),
    "srun from a shell of srun": (
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "1", "SLURM_PTY_PORT": "34889"},
        "8 copies of the run.*`WORLD_SIZE=1`",
    ),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "2 copies of the run"),
    "FSDP": ({"ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for, but one process on cpu"),
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed was asked for, but one process on cpu"),
    "precision": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "the launcher for 'bf16'"),
}
TAKEN = {
    "python": {},
    "torchrun of one": {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"},
    "accelerate launch of one": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false"},
    # torchrun inside a step of Slurm: what is nearest to the process counts.
    "torchrun in srun": {"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"},
    "a shell of srun": {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "34889"},
    # `accelerate launch` of one, where a script or a platform has named a port for all jobs.
    "a port of one's own": {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29511"},
    "a job of one on a platform": {
        "ACCELERATE_MIXED_PRECISION": "no",
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": "23456",
        "WORLD_SIZE": "1",
        "RANK": "0",
    },
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(DPO, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("launcher", REFUSED)
def test_what_was_asked_for_is_in_force_or_refused(launcher, trainer):
    environment, message = REFUSED[launcher]
    with pytest.raises(ConfigurationError, match=message):
        check_strategy(trainer.args, trainer.accelerator, environment)


@pytest.mark.parametrize("launcher", TAKEN)
def test_one_process_that_was_asked_for_is_taken(launcher, trainer):
    check_strategy(trainer.args, trainer.accelerator, TAKEN[launcher])


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OTHER_ADDRESS = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "29511"}
# What is exported before `accelerate launch`, the processes that it is told of, and whether it is refused.
LAUNCHES = {
    "two": ({}, 2, True),
    "two where an address is left over": (OTHER_ADDRESS, 2, True),
    "two where a port is left over": ({"MASTER_PORT": "29511"}, 2, True),
    "one": ({}, 1, False),
    "one where an address is left over": (ADDRESS, 1, False),
    "one on a platform": (OTHER_ADDRESS, 1, False),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_an_address_that_the_launcher_wrote_asks_for_several(launch, trainer):
    before, processes, is_refused = LAUNCHES[launch]
    environment = {"ACCELERATE_MIXED_PRECISION": "no", **before, **(ADDRESS if processes > 1 else {})}
    with pytest.raises(ConfigurationError, match="told of several") if is_refused else nullcontext():
        check_strategy(trainer.args, trainer.accelerator, environment, lambda: before)


@pytest.mark.parametrize("environment", [ADDRESS, {"ACCELERATE_MIXED_PRECISION": "no", **ADDRESS}])
def test_an_address_that_no_launcher_wrote_asks_for_nothing(environment, tmp_path, monkeypatch):
    """As in plain Python, where it is left over, or where the program sets it."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert environment_before_launch() is None
    make_trainer(DPO, tmp_path)


_SEES = (
    "from trl_sipo.trainer.launcher import environment_before_launch as before; print((before() or {}).get('MARK'))"
)
# `accelerate launch` starts one process so: with its own environment and what it adds.
_LAUNCHES = "import os, subprocess, sys; subprocess.run({}, env=os.environ | {{'ACCELERATE_DYNAMO_MODE': 'default'}})"


@pytest.mark.parametrize("between", [[], ["sh", "-c", '"$@"; true', "sh"]], ids=["child", "through_a_shell"])
def test_the_environment_of_the_launcher_is_found(between, monkeypatch):
    monkeypatch.setenv("MARK", "of the launcher")
    child = [*between, sys.executable, "-c", _SEES]
    for command, seen in ((["-c", _LAUNCHES.format(child)], "of the launcher"), (["-c", _SEES], "None")):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.stdout.strip() == seen, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_accelerate_launch_itself(launch, tmp_path):
    before, processes, is_refused = LAUNCHES[launch]
    environment = {name: value for name, value in os.environ.items() if name not in ADDRESS}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    script = ["-m", "tests.trainer.strategy_run", str(tmp_path)]
    done = subprocess.run(
        [*command, *script], env=environment | before, capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert (done.returncode != 0) == is_refused == ("told of several processes and started one" in done.stderr)


@pytest.mark.parametrize("launcher", ["precision"])
def test_the_trainer_looks_at_its_environment(launcher, tmp_path, monkeypatch):
    environment, message = REFUSED[launcher]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(DPO, tmp_path)


def test_mixed_precision_of_the_arguments_is_in_force(tmp_path):
    trainer = make_trainer(DPO, tmp_path, bf16=True)
    assert strategy_in_force(trainer.accelerator) == Strategy("one process", 1, "cpu", "bf16")
    assert "one process on cpu, bf16 mixed precision; 4 pairs per step\n" in trainer.describe_run()


def test_a_precision_that_another_trainer_replaced_is_refused(tmp_path):
    """On a GPU the first one would be computed in float16, autocast's default, and without a scaler."""
    first = make_trainer(DPO, tmp_path / "first", bf16=True)
    second = make_trainer(DPO, tmp_path / "second", max_steps=1)
    with pytest.raises(ConfigurationError, match="made for 'bf16', but 'no' is in force since another one"):
        first.train()
    make_trainer(DPO, tmp_path / "third", bf16=True)
    second.train()  # has no mixed precision, whatever is in force
    assert second.state.global_step == 1


@pytest.mark.parametrize(("config", "precision"), [({"bf16": {"enabled": True}}, "bf16"), ({}, "no")])
def test_deepspeed_has_a_precision_of_its_own(config, precision):
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"fp16": {"enabled": "auto"}, **config})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        num_processes=8,
        device=torch.device("cuda"),
        mixed_precision="no",
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    assert strategy_in_force(accelerator) == Strategy("DeepSpeed ZeRO-3", 8, "cuda", precision)


def test_the_environment_is_read_from_the_inside_out():
    assert launched_processes({}) == 1
    assert launched_processes({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}) == 16


@pytest.mark.parametrize("name", ["DDP", "FSDP2", "DeepSpeed ZeRO-3"])
def test_a_model_that_is_not_wrapped_is_refused(name, tmp_path, monkeypatch):
    """As after an `accelerator.prepare` of the user's own, or a version of Accelerate that wraps otherwise."""
    trainer = make_trainer(DPO, tmp_path)
    monkeypatch.setattr(strategy, "strategy_in_force", lambda accelerator: Strategy(name, 2, "cpu", "no"))
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ConfigurationError, match="each process would train, or hold, a model of its own"):
        trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))


def test_a_model_that_is_wrapped_for_others_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(strategy, "strategy_in_force", lambda accelerator: Strategy("FSDP2", 2, "cuda", "no"))
    monkeypatch.setattr(trainer, "model_wrapped", DistributedDataParallel.__new__(DistributedDataParallel))
    with pytest.raises(ConfigurationError, match="the policy is a DistributedDataParallel"):
        check_prepared(trainer)


def test_unknown_strategies_are_refused(trainer, monkeypatch):
    monkeypatch.setattr(strategy, "strategy_in_force", lambda accelerator: Strategy("FSDP1", 2, "cuda", "no"))
    with pytest.raises(ConfigurationError, match="FSDP1 is in force, which is not supported"):
        check_prepared(trainer)


def test_checkpointing_that_was_switched_off_is_refused(tmp_path):
    trainer = make_trainer(DPO, tmp_path, gradient_checkpointing=True)
    trainer.model.__dict__["activation_checkpointing_enable"] = lambda *args, **kwargs: None
    with pytest.raises(ConfigurationError, match="keeps all its activations"):
        trainer.train()


def test_one_process_under_a_launcher_trains(tmp_path):
    """Accelerate wraps its model as for several."""
    run_ranks(strategy_run.train_in_one_process, tmp_path, directory=tmp_path, processes=1)


def test_copies_that_never_meet_are_refused(tmp_path):
    run_ranks(strategy_run.train_copies_that_never_meet, tmp_path, directory=tmp_path)


def test_fsdp_on_cpus_is_refused(tmp_path):
    run_ranks(strategy_run.ask_for_fsdp_on_cpus, tmp_path, directory=tmp_path)
