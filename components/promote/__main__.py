from components.promote.step import STEP
from components.runner import main

raise SystemExit(main(STEP))
