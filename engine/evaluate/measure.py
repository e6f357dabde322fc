"""The number type of all results: NaN where undefined, which JSON writes as null."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator

#: pydantic writes NaN as null; this reads it back.
Measure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
