from components.merge_adapter.step import STEP
from components.step_command import main

raise SystemExit(main(STEP))
