"""Properties that are computed once."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or sys.version_info >= (3, 12):
    once = cached_property
else:

    class once(cached_property):
        """Before Python 3.12 cached_property takes a lock, which is 1 us: three times a record, when 100,000 are read."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self.attrname] = self.func(instance)
            return value
