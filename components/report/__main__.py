from components.report.step import main

raise SystemExit(main())
