from components.data_prep.step import STEP
from components.runner import main

raise SystemExit(main(STEP))
