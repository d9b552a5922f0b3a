"""Every setting of a run: one section a stage, the same names as in `params.yaml` and `dvc.yaml`.

Importing this package costs no torch: the command line and the schema export read it too.
"""

from typing import Self

from pydantic import Field, NonNegativeInt, model_validator

from rlhf_core.config.align import AlignConfig, ChainConfig, SwitchConfig
from rlhf_core.config.base import Section
from rlhf_core.config.combine import CombineConfig
from rlhf_core.config.data import DataConfig, GenerateConfig, LabelConfig, PreferencesConfig, ValidateConfig
from rlhf_core.config.evaluation import EvaluateConfig, GatesConfig
from rlhf_core.config.machine import MachineConfig
from rlhf_core.config.model import ComputeConfig, ModelConfig
from rlhf_core.config.ppo import PPOConfig
from rlhf_core.config.preference import DPOConfig
from rlhf_core.config.reward import RewardConfig
from rlhf_core.config.sft import SFTConfig

__all__ = [
    "AlignConfig",
    "ChainConfig",
    "CombineConfig",
    "ComputeConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluateConfig",
    "GatesConfig",
    "GenerateConfig",
    "LabelConfig",
    "MachineConfig",
    "ModelConfig",
    "PPOConfig",
    "Params",
    "PreferencesConfig",
    "RewardConfig",
    "SFTConfig",
    "Section",
    "SwitchConfig",
    "ValidateConfig",
]


class Params(Section):
    """The whole of `params.yaml`."""

    seed: NonNegativeInt = Field(0, description="every random choice is addressed from this")
    compute: ComputeConfig = ComputeConfig()
    machine: MachineConfig = MachineConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    validate_: ValidateConfig = Field(ValidateConfig(), alias="validate")
    sft: SFTConfig = SFTConfig()
    generate: GenerateConfig = GenerateConfig()
    label: LabelConfig = LabelConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward: RewardConfig = RewardConfig()
    align: AlignConfig = AlignConfig()
    combine: CombineConfig = CombineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gates: GatesConfig = GatesConfig()

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every policy that is compared with the SFT model: the aligned ones, then the combined ones."""
        return (*self.align.algorithms, *self.combine.methods)

    @model_validator(mode="after")
    def _rounded_weights_are_whole(self) -> Self:
        if self.model.base_weights != "float32" and self.compute.sharding != "none":
            raise ValueError(
                f"model.base_weights {self.model.base_weights} and compute.sharding {self.compute.sharding}: rounded "
                "weights are not divided among processes. Use base_weights float32, or sharding none"
            )
        return self

    @model_validator(mode="after")
    def _members_are_aligned(self) -> Self:
        missing = set(self.combine.members) - set(self.align.algorithms) if self.combine.methods else ()
        if missing:
            raise ValueError(f"combine.members names {', '.join(sorted(missing))}, which align.algorithms does not")
        return self
