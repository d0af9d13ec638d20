"""A reward that the user wrote: any Python function, by its dotted name."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuneloop.errors import UserError
from tuneloop.rewards.base import Reward
from tuneloop.settings import RewardSettings

if TYPE_CHECKING:
    from tuneloop.data.schema import Example


def build(settings: RewardSettings) -> Reward:
    """A reward that calls `function(completion: str, answer: str, metadata: dict) -> float`.

    The function runs in this process, without a time limit.

    Raises:
        UserError: the module or the function does not exist, or it cannot be called.
    """
    function = _resolve(settings)

    def call(example: "Example", completion: str) -> float:
        return function(completion, example.answer, example.metadata)

    return call


def _resolve(settings: RewardSettings) -> Callable[..., Any]:
    where = f"reward {settings.name!r}: function {settings.function!r}"
    module_name, _, attribute = settings.function.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {error}; install it, or run from the folder that holds it") from None
    except Exception as error:
        raise UserError(f"{where}: importing {module_name} failed ({type(error).__name__}: {error})") from error
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise UserError(f"{where}: {module_name} has no {attribute!r}") from None
    if not callable(value):
        raise UserError(f"{where}: is a {type(value).__name__}, which cannot be called")
    return value
