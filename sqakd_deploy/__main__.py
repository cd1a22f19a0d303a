"""``python -m sqakd_deploy`` is the console script, for launchers that start modules."""

from sqakd_deploy.cli import main

main()
