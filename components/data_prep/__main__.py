from components.data_prep.step import STEP
from components.step_command import main

raise SystemExit(main(STEP))
