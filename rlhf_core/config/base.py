"""What all sections of the configuration share."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(ge=0.0, lt=1.0)]
Correlation = Annotated[float, Field(ge=-1.0, le=1.0)]
LARGEST = 2**63 - 1


class Section(BaseModel):
    """Base of every section: unknown keys fail, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        """Whole numbers are 64 bits wide in every library that a value ends in, seeds and sizes alike."""
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"more than {LARGEST:,}, the largest whole number there is room for")
        return value
