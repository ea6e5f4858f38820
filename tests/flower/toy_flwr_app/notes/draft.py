raise SystemExit("not part of the app")
