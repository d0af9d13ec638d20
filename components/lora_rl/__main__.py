from components.lora_rl.step import STEP
from components.runner import main

raise SystemExit(main(STEP))
