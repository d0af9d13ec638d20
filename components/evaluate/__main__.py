from components.evaluate.step import STEP
from components.runner import main

raise SystemExit(main(STEP))
