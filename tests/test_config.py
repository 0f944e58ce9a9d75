"""Every check of an experiment: it names the field and its value, and says what would do."""

import dataclasses
import re

import pytest

from ctrl_jax import config
from ctrl_jax.config import (
    Bond,
    BonRl,
    Calibration,
    Data,
    Decoding,
    Evaluation,
    Experiment,
    FunctionalDerivative,
    GroupProjection,
    Grpo,
    JBond,
    KSample,
    Lora,
    Model,
    Policy,
    Regression,
    RewardModel,
    Supervised,
    Vbon,
)
from ctrl_jax.errors import InputError

KEPT = Calibration(keep_responses=True)
PARTS = (Data, Model, Lora, Supervised, RewardModel, Calibration, Policy, Evaluation)


@pytest.mark.parametrize("part", PARTS)
def test_the_defaults_are_valid_and_frozen(part):
    made = part()
    field = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, getattr(made, field))


def test_an_experiment_needs_only_a_name():
    experiment = Experiment("any")
    assert (experiment.data, experiment.policy) == (Data(), Policy())
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.seed = 1


MAY_BE_0 = {(Data, "corrupted"), (Evaluation, "along"), (Supervised, "steps"), (RewardModel, "steps"), (Lora, "rank")}


def impossible_numbers():
    """(part, field, value) for every field that must be above 0; the exempt are tested with their own checks below."""
    exempt = {"seed", "warmup_steps", "beta"}
    values = {int: (0, -1), float: (0.0, -1.0, float("nan"), float("inf"))}
    for part in PARTS:
        for field in dataclasses.fields(part):
            if field.name not in exempt:
                tried = values.get(field.type, ())
                # 0 steps of fine-tuning is a pretrained model as it is; rank 0 no adapter; 0 points along no curve.
                tried = tried[1:] if (part, field.name) in MAY_BE_0 else tried
                yield from ((part, field.name, value) for value in tried)


@pytest.mark.parametrize(("part", "field", "value"), list(impossible_numbers()))
def test_sizes_and_rates_are_above_zero(part, field, value):
    with pytest.raises(InputError, match=rf"{part.__name__}\.{field} is {re.escape(str(value))};"):
        part(**{field: value})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Data(seed=-1), ["Data.seed is -1", "from 0"]),
        (lambda: Data(source="dialogues"), ["Data.source is 'dialogues'", "dialogues/helpful", "jsonl"]),
        (lambda: Data(source="jsonl"), ["Data.source is 'jsonl'", "Data.path is missing", "`data.path`"]),
        (lambda: Data(path="x"), ["Data.path is 'x'", "dialogues/helpful", "`data.source=files`"]),
        (lambda: Lora(targets=("query",)), ["Lora.targets has ['query']", "q_proj"]),
        (lambda: Model(lora=Lora(rank=4)), ["Model.lora.rank is 4", "Model.path is missing", "`model.path`"]),
        (lambda: Model(adapter="x"), ["Model.adapter is 'x'", "`model.path`"]),
        (lambda: RewardModel(steps=0), ["RewardModel.steps is 0", "`reward_model.path`"]),
        (lambda: RewardModel(path="a", function="b:c"), ["'a'", "'b:c'", "one of them"]),
        (lambda: RewardModel(function="b"), ["RewardModel.function is 'b'", "module:name"]),
        (
            lambda: Experiment("a", sft=Supervised(steps=0)),
            ["sft.steps is 0", "Model.path is missing", "`model.path`", "`sft.steps`"],
        ),
        (lambda: Experiment("a", seed=2**32), ["Experiment.seed is 4294967296", "to 4294967295"]),
        (lambda: Model(width=100, heads=8), ["Model.width is 100", "Model.heads 8", "multiple of 2 × heads"]),
        (lambda: Model(heads=4, kv_heads=3), ["Model.heads is 4", "Model.kv_heads 3", "kv_heads"]),
        (
            lambda: Supervised(steps=5, warmup_steps=5),
            ["Supervised.warmup_steps is 5", "Supervised.steps 5", "shorter"],
        ),
        (lambda: Supervised(warmup_steps=-1), ["Supervised.warmup_steps is -1", "at least 0"]),
        (lambda: Policy(steps=3, warmup_steps=4), ["Policy.warmup_steps is 4", "Policy.steps 3", "shorter"]),
        (lambda: Calibration(samples_per_prompt=1), ["Calibration.samples_per_prompt is 1", "at least 2"]),
        (
            lambda: Calibration(samples_per_prompt=8, quantiles=9),
            ["Calibration.quantiles is 9", "samples_per_prompt 8", "Lower the first, raise the second"],
        ),
        (lambda: Calibration(quantiles=1), ["Calibration.quantiles is 1"]),
        (lambda: Policy(kl_limit=1.0), ["Policy.kl_limit is 1.0", "multiple of the budget", "inf for no limit"]),
        (lambda: Policy(micro_batches=0), ["Policy.micro_batches is 0"]),
        (lambda: Supervised(micro_batches=0), ["Supervised.micro_batches is 0"]),
        (lambda: Policy(samples_per_prompt=1), ["Policy.samples_per_prompt is 1", "at least 2"]),
        (lambda: Policy(kl_budget=-0.5), ["Policy.kl_budget is -0.5", "nats per response", "above 0"]),
        (lambda: Policy(beta=0.0), ["Policy.beta is 0.0", "greater than 0, or left out"]),
        (lambda: Policy(beta=float("inf")), ["Policy.beta is inf", "greater than 0, or left out"]),
        (lambda: Model(rope_theta=1e300), ["Model.rope_theta is 1e+300", "between 1 and 1e+12", "float32"]),
        (lambda: Model(norm_epsilon=1e-300), ["Model.norm_epsilon is 1e-300", "between 1e-20 and 1"]),
        (lambda: Lora(alpha=1e300), ["Lora.alpha is 1e+300", "between 1e-06 and 1e+06"]),
        (lambda: Supervised(learning_rate=1e-300), ["Supervised.learning_rate is 1e-300", "last digit", "float32"]),
        (lambda: RewardModel(learning_rate=1e300), ["RewardModel.learning_rate is 1e+300", "overflow"]),
        (lambda: Policy(learning_rate=1e-50), ["Policy.learning_rate is 1e-50", "last digit", "float32"]),
        (lambda: Policy(max_gradient_norm=1e-300), ["Policy.max_gradient_norm is 1e-300", "between 1e-12"]),
        (lambda: Policy(temperature=1e-300), ["Policy.temperature is 1e-300", "between 0.001 and 1000", "logits"]),
        (lambda: Policy(temperature=1e300), ["Policy.temperature is 1e+300", "between 0.001 and 1000", "logits"]),
        (lambda: Decoding(temperature=1e-300), ["Decoding.temperature is 1e-300", "between 1e-06 and 1000"]),
        (lambda: Policy(beta=1e300), ["Policy.beta is 1e+300", "between 1e-06 and 1000", "below 1e-7 nats"]),
        (lambda: Policy(beta=1e-300), ["Policy.beta is 1e-300", "loses the KL beside the reward"]),
        (lambda: Policy(beta=1e31, transform="raw"), ["Policy.beta is 1e+31", "between 1e-30 and 1e+30"]),
        (lambda: Policy(kl_budget=1e-300), ["Policy.kl_budget is 1e-300", "cannot be measured in float32"]),
        (lambda: Policy(kl_budget=1e300), ["Policy.kl_budget is 1e+300", "between 1e-06 and 10000"]),
        (
            lambda: Experiment("a", policy=Policy(kl_budget=50.0, transform="optimal")),
            [
                "kl_budget is 50 nats",
                "128 reference responses a prompt support 5.43",
                "`calibration.samples_per_prompt`",
            ],
        ),
        (
            lambda: Experiment(
                "a",
                policy=Policy(kl_budget=3.0, transform="raw"),
                calibration=Calibration(samples_per_prompt=64, quantiles=16),
            ),
            ["kl_budget is 3 nats", "16 reference responses a prompt support 2.77", "`calibration.quantiles`"],
        ),
        (lambda: Evaluation(bootstrap_resamples=1), ["Evaluation.bootstrap_resamples is 1;", "at least 100", "95 %"]),
        (lambda: Policy(procedure="nan*best_of_2+1*best_of_2"), ["nan", "is not a probability"]),
        (lambda: Policy(procedure="best_off_4"), ["'best_off_4'", "Did you mean best_of_4"]),
        (lambda: Policy(procedure="best_of_0"), ["0", "at least 1"]),
        (lambda: Policy(transform="logaritm"), ["'logaritm'", "Did you mean logarithm"]),
        (lambda: Policy(transform="exponential(a)"), ["'a'", "not a number"]),
        (lambda: Evaluation(procedures=("best_of",)), ["'best_of'", "Did you mean best_of_4"]),
        (
            lambda: Evaluation(procedures=("best_of_32",), responses_per_prompt=16),
            ["'best_of_32'", "needs 32", "Evaluation.responses_per_prompt is 16", "raise it to at least 32"],
        ),
        (
            lambda: Experiment("a", policy=Policy(procedure="best_of_65")),
            ["Policy.procedure is 'best_of_65'", "needs 65", "responses_per_prompt is 64", "raise it to at least 65"],
        ),
        (
            lambda: Experiment("a", calibration=Calibration(prompts=31), policy=Policy(prompts_per_step=32)),
            ["Policy.prompts_per_step is 32", "Calibration.prompts = 31", "lower the first or raise the second"],
        ),
        (
            lambda: Experiment("a", data=Data(dialogues=63), sft=Supervised(batch_size=64)),
            ["sft.batch_size is 64", "Data.dialogues = 63", "lower the first or raise the second"],
        ),
        (
            lambda: Experiment(
                "a",
                data=Data(dialogues=63),
                sft=Supervised(batch_size=63),
                reward_model=Supervised(batch_size=64),
            ),
            ["reward_model.batch_size is 64", "Data.dialogues = 63"],
        ),
        (
            lambda: Experiment("a", start=Regression()),
            ["Calibration.keep_responses is False", "the start (Regression)", "set it to True"],
        ),
        (
            lambda: Experiment("a", policy=GroupProjection()),
            ["Calibration.keep_responses is False", "the policy (GroupProjection)", "set it to True"],
        ),
        (
            lambda: Experiment("a", calibration=KEPT, start=Policy()),
            ["Experiment.start is a Policy", "does not learn from stored responses", "WeightedLikelihood"],
        ),
        (
            lambda: Experiment("a", calibration=KEPT, start=Regression(samples_per_prompt=24)),
            ["Regression.samples_per_prompt is 24", "the 128 responses", "make the second a multiple of the first"],
        ),
        (
            lambda: Experiment("a", calibration=KEPT, start=Regression(prompts_per_step=2049)),
            ["Regression.prompts_per_step is 2049", "2048 groups", "`calibration.prompts`"],
        ),
        (
            lambda: Experiment("a", calibration=KEPT, start=Regression(temperature=0.5)),
            ["Regression.temperature is 0.5", "drawn at 1.0", "give both the same"],
        ),
        (
            lambda: Experiment("a", calibration=KEPT, start=Regression(kl_budget=50.0)),
            ["Start.kl_budget is 50 nats", "Lower `start.kl_budget`"],
        ),
        (lambda: Vbon(beta=None), ["Vbon.beta is missing", "1/3 for N = 4"]),
        (lambda: Bond(transform="identity"), ["Bond.transform is 'identity'", "leave it at logarithm"]),
        (lambda: Bond(backward=1.5), ["Bond.backward is 1.5", "between 0 and 1"]),
        (lambda: KSample(procedure="sampling"), ["KSample.procedure is 'sampling'", "of at least 2", "give a Policy"]),
        (lambda: KSample(procedure="worst_of_4"), ["KSample.procedure is 'worst_of_4'", "best_of_N"]),
        (lambda: KSample(procedure="best_of_1"), ["KSample.procedure is 'best_of_1'", "of one sample it is CTRL"]),
        (
            lambda: KSample(procedure="best_of_8", samples_per_prompt=7),
            ["KSample.samples_per_prompt is 7", "at least 8", "picks among"],
        ),
        (lambda: BonRl(success=1.0), ["BonRl.success is 1.0", "below 1"]),
        (lambda: BonRl(success=float("nan")), ["BonRl.success is nan", "below 1"]),
        (lambda: BonRl(transform="identity"), ["BonRl.transform is 'identity'", "leave it at raw"]),
        (lambda: BonRl(procedure="worst_of_2"), ["BonRl.procedure is 'worst_of_2'", "best_of_N"]),
        (
            lambda: FunctionalDerivative(samples_per_prompt=4),
            ["FunctionalDerivative.samples_per_prompt is 4", "at least 5", "one to leave out"],
        ),
        (
            lambda: FunctionalDerivative(transform="raw"),
            ["FunctionalDerivative.transform is 'raw'", "leave it at optimal"],
        ),
        (lambda: JBond(samples_per_prompt=2), ["JBond.samples_per_prompt is 2", "at least 3"]),
        (lambda: JBond(backward=-0.1), ["JBond.backward is -0.1", "between 0 and 1"]),
        (lambda: Grpo(clip=1.5), ["Grpo.clip is 1.5"]),
        (lambda: config.Pairs(), ["Pairs has the options", "give one of those: Dpo, Ipo, RobustDpo or Slic"]),
        (lambda: config.Stored(), ["Stored has the options", "BestOfNSft, Bonbon, GroupProjection", "or Weighted"]),
        (lambda: config.BestOfGroup(), ["BestOfGroup has the options", "give one of those: BestOfNSft or Bonbon"]),
        (lambda: config.Dpo(beta=None), ["Dpo.beta is missing", "give the weight of the KL"]),
        (lambda: config.Ipo(beta=None), ["Ipo.beta is missing", "give the weight of the KL"]),
        (lambda: config.Ipo(transform="identity"), ["Ipo.transform is 'identity'", "leave it at raw"]),
        (lambda: config.RobustDpo(flip_probability=0.5), ["RobustDpo.flip_probability is 0.5", "between 0 and 0.45"]),
        (lambda: config.RobustDpo(flip_probability=-0.1), ["RobustDpo.flip_probability is -0.1"]),
        (lambda: config.Slic(beta=0.1), ["Slic.beta is 0.1", "`policy.margin` and `policy.regularization`"]),
        (lambda: config.Slic(margin=0.0), ["Slic.margin is 0.0", "between 0.001 and 1000"]),
        (lambda: config.Slic(regularization=0.0), ["Slic.regularization is 0.0", "nothing keeps the policy near"]),
        (lambda: config.Bonbon(alpha=1.5), ["Bonbon.alpha is 1.5", "between 0 and 1"]),
        (lambda: config.Bonbon(beta=0.1), ["Bonbon.beta is 0.1", "choose N, `policy.samples_per_prompt`"]),
        (lambda: config.BestOfNSft(transform="identity"), ["BestOfNSft.transform is 'identity'", "leave it there"]),
        (
            lambda: Experiment("a", calibration=KEPT, policy=config.Bonbon(samples_per_prompt=3)),
            ["Bonbon.samples_per_prompt is 3", "the 128 responses"],
        ),
        (lambda: Policy(floors=(0.5, 1.0)), ["Policy.floors is (0.5, 1.0)", "between 0 and 1"]),
        (lambda: Policy(floors=0.5), ["Policy.floors is 0.5", "a tuple such as (0.5,)"]),
        (lambda: Policy(floors="0.5"), ["Policy.floors is '0.5'", "a tuple such as (0.5,)"]),
        (lambda: config.Dpo(floors=(0.5,)), ["Dpo.floors is (0.5,)", "leave it out", "none are sampled"]),
        (lambda: config.Regression(floors=(0.5,)), ["Regression.floors is (0.5,)", "none are sampled"]),
        (
            lambda: Experiment("a", policy=Policy(floors=(0.5,))),
            ["Policy.floors is (0.5,)", "names 0 rewards", "a floor for each"],
        ),
        (
            lambda: Experiment(
                "a",
                policy=Policy(floors=(0.5,)),
                combine=config.Combine(rewards=("a:b",), by="log_sigmoids(0.85)"),
            ),
            ["combine.by is 'log_sigmoids(0.85)'", "hold combine.rewards at floors", "leave one of the two out"],
        ),
        (lambda: config.Slic(beta_share=0.5), ["Slic.beta_share is 0.5", "no KL is in its loss"]),
        (lambda: config.Bonbon(beta_share=0.5), ["Bonbon.beta_share is 0.5", "best-of-N has no β"]),
        (
            lambda: Experiment("a", calibration=KEPT, start=GroupProjection(kl_limit=3.0)),
            ["Start.kl_limit is 3.0", "is an estimate, which stops nothing"],
        ),
        *(
            (
                lambda policy=policy, few=few, quantiles=quantiles: Experiment(
                    "a",
                    policy=policy,
                    calibration=Calibration(samples_per_prompt=few, quantiles=quantiles),
                ),
                [f"keeps {few} reference rewards", f"needs {needs}", "raise `calibration.samples_per_prompt`"],
            )
            for quantiles, few, policy, needs in (
                (None, 3, BonRl(kl_budget=0.3), 4),
                (3, 3, KSample(kl_budget=0.3), 4),
                (None, 3, FunctionalDerivative(kl_budget=0.3), 4),
            )
        ),
        (
            lambda: Experiment("a", policy=FunctionalDerivative(), calibration=Calibration(quantiles=32)),
            ["Calibration.quantiles is 32", "rewards themselves", "leave it out"],
        ),
        *(
            (
                lambda policy=policy: Experiment("a", policy=policy, combine=config.Combine(by="log_sigmoids(0.85)")),
                ["of one reward, whose order stays as it is", f"{type(policy).__name__} with transform 'raw'"],
            )
            for policy in (BonRl(kl_budget=0.3), JBond(kl_budget=0.3), config.Dpo())
        ),
        (lambda: Experiment("stages"), ["Experiment.name is 'stages'", "choose another"]),
        (lambda: Experiment("../other"), ["Experiment.name is '../other'", "choose another"]),
        (lambda: Experiment(""), ["Experiment.name is ''", "choose another"]),
    ],
)
def test_bad_values_are_refused_with_the_fix(make, told):
    with pytest.raises(InputError) as caught:
        make()
    for part in told:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("transform", ["raw", "optimal", "identity", "logarithm", "logit", "exponential(-5)"])
@pytest.mark.parametrize("procedure", ["sampling", "best_of_4", "worst_of_16", "soft_best_of_4(0.1)"])
def test_every_documented_name_is_accepted(transform, procedure):
    assert Policy(transform=transform, procedure=procedure).beta is None


def test_a_procedure_may_need_exactly_all_responses():
    evaluation = Evaluation(procedures=("best_of_4",), responses_per_prompt=4)
    experiment = Experiment("a", policy=Policy(procedure="worst_of_4"), evaluation=evaluation)
    assert experiment.evaluation.responses_per_prompt == 4


def test_a_grid_crosses_transforms_and_budgets_and_lets_go_of_beta():
    base = Experiment("base", seed=3, policy=Policy(beta=0.2))
    points = config.grid(base, transforms=("identity", "logit"), kl_budgets=(0.5, 1.0))
    assert [(point.policy.transform, point.policy.kl_budget) for point in points] == [
        ("identity", 0.5), ("logit", 0.5), ("identity", 1.0), ("logit", 1.0),
    ]  # fmt: skip
    assert len({point.name for point in points}) == 4
    assert {(point.seed, point.policy.beta) for point in points} == {(3, None)}


def test_a_grids_starts_have_its_transforms_and_their_share_of_its_budgets():
    base = Experiment("base", calibration=KEPT, policy=Policy(kl_budget=1.0), start=Regression(kl_budget=0.5, beta=2.0))
    points = config.grid(base, transforms=("identity",), kl_budgets=(0.5, 1.0))
    starts = [(type(one.start), one.start.transform, one.start.kl_budget, one.start.beta) for one in points]
    assert starts == [(Regression, "identity", 0.25, None), (Regression, "identity", 0.5, None)]


def test_a_held_beta_aims_at_no_budget():
    assert Experiment("a", policy=Policy(kl_budget=50.0, beta=0.1)).policy.kl_budget == 50
    assert Policy(beta=1e20, transform="raw").beta == 1e20


def test_a_table_has_all_rewards_or_their_quantiles():
    assert Calibration(samples_per_prompt=32).rewards_per_prompt == 32
    assert Calibration(samples_per_prompt=32, quantiles=8).rewards_per_prompt == 8


def test_an_algorithm_is_called_by_its_label_or_its_class():
    @dataclasses.dataclass(frozen=True)
    class Mine(config.Grpo):
        pass

    found = [
        config.Policy(), config.Policy(transform="identity"), config.Grpo(), config.PpoClip(transform="identity"),
        Mine(), config.Regression(), config.Bond(),
    ]  # fmt: skip
    assert [policy.method for policy in found] == [
        "exponential(10)", "identity", "GRPO", "PPO-clip, identity", "Mine", "QRPO, exponential(10)", "BOND",
    ]  # fmt: skip
    assert [policy.aims for policy in found] == [True] * 6 + [False]
    assert not config.Dpo().aims and not config.Slic().aims and not config.Bonbon().aims
