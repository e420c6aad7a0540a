from sb3_deepcrl.analysis.cli import main

if __name__ == "__main__":
    main()
