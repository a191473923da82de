"""Values of a config.json by key, with their types checked."""

import dataclasses
import math
from typing import Any, NoReturn

from deepseek_jax.inputs import shown

_REQUIRED = object()
LARGEST = 1e300  # of a float; JSON has integers that no float can hold


@dataclasses.dataclass(frozen=True)
class Keys:
    """A section of a config.json, and the name of the file or section for messages."""

    section: dict[str, Any]
    origin: str

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return the value of `key`; `default` where it is absent or null.

        Raises:
            ValueError: it is of another type, a float that is not finite, or absent without a default.
        """
        value = self.section.get(key)
        if value is None:
            if default is _REQUIRED:
                self.refuse(key, "the key is required; take the config.json that belongs to the weights")
            return default
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if abs(value) > LARGEST or not math.isfinite(value):
                self.refuse(key, "it must be a finite number")
            return float(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            self.refuse(key, f"it must be of type {kind.__name__}")
        return value

    def refuse(self, key: str, text: str) -> NoReturn:
        """Raise a `ValueError` that shows the key and its value, and says why it is refused and what to do."""
        value = shown(repr(self.section[key])) if key in self.section else "absent"
        raise ValueError(f"{shown(self.origin)}: {key} is {value}: {text}")
