"""Base of all sections of curation and chat data files."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from megatron_smol.errors import nearest


class Section(BaseModel):
    """An unknown field is an error that names the nearest one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"'{name}' is not known here; {nearest(str(name), cls.model_fields)}")
        return value
