from components.sft_warmup.step import STEP
from components.runner import main

raise SystemExit(main(STEP))
