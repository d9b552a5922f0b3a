"""What all sections of the configuration share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(ge=0.0, lt=1.0)]
Correlation = Annotated[float, Field(ge=-1.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys fail, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
