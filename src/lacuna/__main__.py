from lacuna.cli import main

main()
