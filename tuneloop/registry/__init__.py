"""The registry of adapters: immutable versions, and aliases that are moved by compare-and-swap.

```text
<registry>/<adapter name>/versions/<n>/claim.json     who took the number, and for which files; written first
                                       adapter/…      PEFT's files
                                       version.json   the record, with the sha256 of every file; written last
<registry>/<adapter name>/aliases/<alias>.json        {"version", "previous", "moved_at", "moved_by"}
```
A version is there once its version.json is.
"""

from tuneloop.registry.aliases import PRODUCTION, Alias, AliasMoved
from tuneloop.registry.registry import Registry
from tuneloop.registry.versions import ListedVersion, RegisteredVersion

__all__ = ["PRODUCTION", "Alias", "AliasMoved", "ListedVersion", "RegisteredVersion", "Registry"]
