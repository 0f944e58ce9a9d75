"""The training loop on a step that a test can see through."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax import build
from ctrl_jax.__main__ import load_experiment
from ctrl_jax.build import TrainState
from ctrl_jax.data.pipelines import batches
from ctrl_jax.errors import InputError
from ctrl_jax.jobs import fit as fit_module
from ctrl_jax.jobs.fit import fit
from ctrl_jax.models import lora
from ctrl_jax.models.architecture import from_config
from ctrl_jax.runtime.compilations import compilations
from ctrl_jax.runtime.mesh import make_mesh, replicate
from ctrl_jax.runtime.metrics import read_metrics
from ctrl_jax.steps import kl_budget
from ctrl_jax.types import Prompts

DATA = np.arange(1, 9, dtype=np.float32)


def train(directory, mesh, *, steps=6, diverges_at=None, data=None):
    """Sums its batches into the parameter."""

    @jax.jit
    def step(state, batch):
        loss = batch.sum()
        if diverges_at is not None:
            loss = jnp.where(state.step + 1 == diverges_at, jnp.nan, loss)
        metrics = {"loss": loss, "gradient_norm": jnp.ones(())}
        return TrainState(state.step + 1, state.params + batch.sum(), None), metrics

    return fit(
        "sum",
        step,
        replicate(mesh, TrainState(jnp.int32(0), jnp.float32(0), None)),
        batches(DATA, batch_size=8, seed=0) if data is None else data,
        mesh=mesh,
        steps=steps,
        checkpoint_every=2,
        directory=directory,
        fingerprint="sum",
        columns=("loss",),
    )


def test_takes_its_steps_and_goes_on_where_it_stopped(tmp_path, mesh):
    assert float(train(tmp_path, mesh, steps=4).params) == 4 * DATA.sum()
    assert float(train(tmp_path, mesh, steps=7).params) == 7 * DATA.sum()
    np.testing.assert_array_equal(read_metrics(tmp_path / "metrics.jsonl")["step"], np.arange(1, 8))
    assert float(train(tmp_path, mesh, steps=7).params) == 7 * DATA.sum()


@pytest.mark.parametrize("diverges_at", [3, 4])
def test_divergence_is_told_before_it_is_saved(tmp_path, mesh, diverges_at):
    """Between checkpoints and at one; then the same command goes on from the last good state."""
    with pytest.raises(InputError, match=rf"sum diverged at step {diverges_at}: the loss is nan.*learning rate"):
        train(tmp_path, mesh, diverges_at=diverges_at)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2"]
    assert float(train(tmp_path, mesh).params) == 6 * DATA.sum()


class Growing:
    """Batches of which some are longer than those before."""

    def __init__(self, *sizes):
        self.sizes = iter(sizes)

    def __next__(self):
        return np.ones(next(self.sizes), np.float32)

    def get_state(self):
        return {}


@pytest.mark.parametrize(("sizes", "told"), [((8, 8, 8, 8), []), ((8, 8, 16, 24), [3]), ((16, 8, 8, 8), [2])])
def test_a_step_that_compiles_again_is_told_once(tmp_path, mesh, capsys, sizes, told):
    assert float(train(tmp_path, mesh, steps=4, data=Growing(*sizes)).params) == sum(sizes)
    printed = " ".join(capsys.readouterr().out.split())
    assert [int(step) for step in re.findall(r"step (\d+) compiled `[^`]*step[^`]*` again", printed)] == told
    assert printed.count("again") == len(told)


def test_the_steps_of_the_smoke_run_compile_each_program_once(tmp_path, monkeypatch, request):
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all of the time is LLVM's
    request.addfinalizer(lambda: jax.config.update("jax_disable_most_optimizations", False))
    experiment = load_experiment("smoke").experiment()
    settings, mesh = experiment.policy, make_mesh(1)
    parts = build.models(from_config(experiment.model, 512), experiment.model.lora)
    reference = build.init_decoder(parts, mesh, jax.random.key(0))
    reward = lora.overlay(*build.adapt_reward(parts, mesh, jax.random.key(1), reference))
    scorer, optimizer = build.scorer(parts, mesh), build.policy_optimizer(settings)
    step = build.policy_step(
        parts, mesh, settings, build.transform_of(settings, 16), optimizer, lambda *batch: scorer(reward, *batch),
        key=jax.random.key(2), max_length=experiment.data.response_length, eos_ids=(1,),
    )  # fmt: skip
    size = experiment.calibration.prompts
    prompts = Prompts(np.ones((size, 40), np.int32), np.full(size, 7, np.int32), np.arange(size, dtype=np.uint32))
    rewards = np.zeros((size, 16), np.float32)
    compiled = []

    @contextlib.contextmanager
    def counted():
        with compilations() as found:
            yield found
        compiled.append(sorted(found))

    monkeypatch.setattr(fit_module, "compilations", counted)
    fit(
        "smoke",
        lambda state, batch: step(state, reference, batch),
        build.init_state(reference, optimizer, mesh, kl_budget.init(0.2, budget=settings.kl_budget)),
        batches(build.PolicyBatch(prompts, rewards), batch_size=settings.prompts_per_step, seed=0),
        mesh=mesh,
        steps=4,
        checkpoint_every=2,
        directory=tmp_path,
        fingerprint="smoke",
        columns=(),
    )
    first, *others = compiled
    assert len(first) >= 4 and {"sample", "update"} <= {name.removeprefix("jit(").rstrip(")") for name in first}
    assert others == [[]] * 3, "after the first step, at checkpoints, and behind them"
