from components.merge_adapter.step import STEP
from components.runner import main

raise SystemExit(main(STEP))
