from components.sft_warmup.step import STEP
from components.step_command import main

raise SystemExit(main(STEP))
