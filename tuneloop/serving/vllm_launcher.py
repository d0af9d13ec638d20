"""vLLM's OpenAI server, closed to other machines where it loads adapters, and with a repair that replacing one needs.

vLLM 0.32 keeps the flag `load_inplace` on an adapter that was replaced in place, and reads it from the disk again at
every step that follows. Unloading and loading instead leaves moments in which requests for the name get a 404. Here the
flag is cleared once the replacement is done; a vLLM that clears it itself is left alone.
"""

import runpy
import sys
from collections.abc import Sequence

from tuneloop.errors import UserError

SERVER = "vllm.entrypoints.openai.api_server"
DOORS = "tuneloop.serving.doors.Doors"


def launch(arguments: Sequence[str]) -> None:
    """Run vLLM's server with its own command line until it ends.

    Raises:
        UserError: vLLM is not installed.
    """
    try:
        replace_once()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise UserError("vLLM is not installed here: pip install vllm, or run the train image") from None
    sys.argv = [SERVER, "--middleware", DOORS, *arguments]
    runpy.run_module(SERVER, run_name="__main__")


def replace_once() -> None:
    """Let a replacement in place happen once, not at every step that follows."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    load = OpenAIServingModels.load_lora_adapter

    async def load_and_clear(self, request, *arguments, **options):
        answer = await load(self, request, *arguments, **options)
        stored = self.lora_requests.get(request.lora_name)
        if stored is not None and stored.load_inplace:
            stored.load_inplace = False
        return answer

    OpenAIServingModels.load_lora_adapter = load_and_clear
