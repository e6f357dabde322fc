"""The base of every configuration class: unknown keys are errors, values are checked on assignment."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """pydantic model that refuses unknown keys (``recipe.py`` turns the refusal into "did you mean ...")."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())
