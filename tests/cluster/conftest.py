"""Fixtures of this folder's tests: the command line, and doubles of the servers that it calls."""

from tests.cluster.command import command
from tests.cluster.kfp_server import kfp_server
from tests.cluster.kube_api import kube_api
from tests.s3_server import s3_server

__all__ = ["command", "kfp_server", "kube_api", "s3_server"]
