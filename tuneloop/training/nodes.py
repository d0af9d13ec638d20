"""The machines that train one adapter together, and this one's place among them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tuneloop.errors import UserError

_VARIABLES = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")  # torchrun's own, for its options


@dataclass(frozen=True)
class Nodes:
    """Where the processes of other machines are met.

    Attributes:
        count: machines; 1: no others.
        rank: this one's, from 0; the first one is met by the others.
        address, port: of the first one.
    """

    count: int = 1
    rank: int = 0
    address: str = "localhost"
    port: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Nodes":
        """As torchrun's variables describe it; without them, this machine alone.

        Raises:
            UserError: they are not complete.
        """
        found = {name: environment[name] for name in _VARIABLES if environment.get(name)}
        if "PET_NNODES" not in found:
            return cls()
        try:
            count, rank, address, port = (found[name] for name in _VARIABLES)
            nodes = cls(int(count), int(rank), address, int(port))
        except (KeyError, ValueError):
            given = ", ".join(f"{name}={environment.get(name, '')}" for name in _VARIABLES)
            raise UserError(f"{given}: this node's place among the others is not clear; start it as a node of a "
                            "TrainJob with a torch runtime, or set all four") from None  # fmt: skip
        if not 0 <= nodes.rank < nodes.count:
            raise UserError(f"PET_NODE_RANK={nodes.rank}: ranks of PET_NNODES={nodes.count} nodes go from 0")
        return nodes

    @property
    def rendezvous(self) -> str:
        """The first one's address and port."""
        return f"{self.address}:{self.port}"
