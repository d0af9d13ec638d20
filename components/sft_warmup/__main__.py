from components.runner import main
from components.sft_warmup.step import STEP

raise SystemExit(main(STEP))
