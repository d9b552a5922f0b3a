"""What a plan says of stages that fit or do not, and that the change it names makes them fit."""

import pytest

from rlhf_core.config import Params
from rlhf_core.config.lora import LoraConfig
from rlhf_core.planning import alignment, footprints, parts
from rlhf_core.planning.shapes import ModelShape
from rlhf_core.planning.workload import Workload
from tasks.params import check_params, parse_yaml
from tasks.planning.fitting import smallest_change, with_changes
from tasks.planning.plan import Known, Machine, StagePlan, problems, stage_plans

GB = 2**30
SMOLLM2 = ModelShape(
    hidden=576, layers=30, heads=9, kv_heads=3, head_size=64, feed_forward=1536, vocabulary=49152, tied=True
)
WORK = Workload(
    demonstrations=2000,
    kept=50,
    demonstration_lengths=[(200, 80), (150, 60), (120, 90)],
    pairs=2000,
    groups=1800,
    group_lengths=[[200, 80, 70], [150, 60, 90], [180, 40, 50]],
    heldout_pairs=200,
    prompts=20,  # few, so that training and not sampling is what needs most
    heldout_prompts=20,
    prompt_lengths=[200, 150, 180],
    sampled=3,
)
KNOWN = Known(shape=SMOLLM2, workload=WORK)
STAGES = ("sft", "generate", "reward", "align@ppo", "align@dpo", "evaluate")


def params(**model: object) -> Params:
    return Params.model_validate({"model": {"max_prompt_tokens": 256, "max_response_tokens": 128, **model}})


def machine(memory: float, disk: float = 1000.0) -> Machine:
    return Machine(
        processor="one of a test", cores=2, free_memory_bytes=int(memory * GB), free_disk_bytes=int(disk * GB)
    )


def peaks(changed: Params) -> dict[str, StagePlan]:
    return {plan.stage: plan for plan in stage_plans(KNOWN, changed, STAGES, ())}


def test_what_fits_needs_no_change() -> None:
    assert smallest_change(KNOWN, params(), STAGES, (), machine(100)) == ()


def test_the_smallest_change_fits_by_the_same_estimate_and_a_step_less_does_not() -> None:
    before = peaks(params())["align@dpo"]
    limit = machine(before.memory_bytes / GB * 0.7)
    change = smallest_change(KNOWN, params(), ("align@dpo",), (), limit)
    assert change is not None
    assert len(change) == 1
    key, _, value = change[0].partition("=")
    assert key == "align.dpo.prompts_per_forward"  # the same result in smaller passes comes before anything else
    fitting = with_changes(params(), {key: int(value)})
    milder = with_changes(params(), {key: int(value) * 2})
    assert fitting is not None
    assert milder is not None
    assert not problems(stage_plans(KNOWN, fitting, ("align@dpo",), ()), limit)
    assert problems(stage_plans(KNOWN, milder, ("align@dpo",), ()), limit)


def test_several_changes_together_where_one_is_not_enough_and_none_where_nothing_is() -> None:
    change = smallest_change(KNOWN, params(), STAGES, (), machine(5.0))
    assert change is not None
    assert len(change) > 1
    document = parse_yaml("{}", "a test")
    assert check_params(document, "a test")
    changed = params()
    for one in change:
        key, _, value = one.partition("=")
        changed = with_changes(changed, {key: parse_yaml(f"value: {value}", "a test")["value"]})  # as --set reads it
        assert changed is not None
    assert not problems(stage_plans(KNOWN, changed, STAGES, ()), machine(5.0))
    assert smallest_change(KNOWN, params(), STAGES, (), machine(0.9)) is None


def test_stages_that_are_up_to_date_need_nothing() -> None:
    plans = stage_plans(KNOWN, params(), STAGES, ("sft", "align@ppo"))
    assert [plan.stage for plan in plans if plan.cached] == ["sft", "align@ppo"]
    assert not problems([plan for plan in plans if plan.cached], machine(0.1))


def test_disk_is_a_problem_of_the_run_and_not_of_a_stage() -> None:
    (found,) = problems(stage_plans(KNOWN, params(), STAGES, ()), machine(100, disk=2))
    assert found.what == "disk"
    assert found.stage == ""
    written = 2 * sum(one.disk_bytes // 2 for one in stage_plans(KNOWN, params(), STAGES, ()))
    assert found.needed_bytes > written


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({"align.ppo.microbatch": 4}, "align@ppo"),
        ({"align.dpo.prompts_per_forward": 2}, "align@dpo"),
        ({"compute.activation_checkpointing": True}, "align@dpo"),
        ({"align.ppo.value.model": "shared"}, "align@ppo"),
        ({"compute.memory_gb": 0.1}, "generate"),
        ({"compute.sampled_rows": 4}, "evaluate"),
        ({"generate.batch_size": 8}, "generate"),
    ],
)
def test_each_setting_that_saves_memory_saves_it_in_the_estimate(change: dict[str, object], stage: str) -> None:
    less = with_changes(params(), change)
    assert less is not None
    assert peaks(less)[stage].memory_bytes < peaks(params())[stage].memory_bytes


def test_adapters_train_little_and_leave_no_moments_of_weights() -> None:
    whole, adapted = peaks(params()), peaks(params(lora=LoraConfig(rank=16, stages=("reward", "align")).model_dump()))
    for stage in ("align@ppo", "align@dpo"):
        assert adapted[stage].trained_parameters < whole[stage].trained_parameters / 20
        assert adapted[stage].checkpoint_bytes < whole[stage].checkpoint_bytes / 20


def test_amounts_that_a_plan_counts_by_are_the_stages() -> None:
    from rlhf_core.engine import batches
    from rlhf_core.trainers import passes
    from tasks.stages.align import run as align
    from tasks.stages.reward import run as reward
    from tasks.stages.sft import figures

    assert parts.CPU_PASS_TOKENS == passes.CPU_PASS_TOKENS
    assert (parts.NARROW_ROWS, parts.WIDE_ROWS) == (batches.ROWS_AT_ONCE, batches.WIDE_ROWS_AT_ONCE)
    assert alignment.MEASURED_PROMPTS == align.MEASURED_PROMPTS
    assert footprints.STANDARDISED_GROUPS == reward.STANDARDISE_GROUPS
    assert footprints.SHOWN_PROMPTS == figures.NUM_SAMPLES
