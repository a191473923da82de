"""Values of a config.json by key, with their types checked."""

import dataclasses
from typing import Any, NoReturn

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Keys:
    """A section of a config.json, and the name of the file or section for messages."""

    section: dict[str, Any]
    origin: str

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return the value of `key`; `default` where it is absent or null.

        Raises:
            ValueError: it is of another type, or absent without a default.
        """
        value = self.section.get(key)
        if value is None:
            if default is _REQUIRED:
                self.refuse(key, "the key is required; take the config.json that belongs to the weights")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            self.refuse(key, f"it must be of type {kind.__name__}")
        return value

    def refuse(self, key: str, text: str) -> NoReturn:
        """Raise a `ValueError` that shows the key and its value, and says why it is refused and what to do."""
        value = repr(self.section[key]) if key in self.section else "absent"
        raise ValueError(f"{self.origin}: {key} is {value}: {text}")
