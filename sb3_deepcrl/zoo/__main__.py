from sb3_deepcrl.zoo.launcher import main

if __name__ == "__main__":
    main()
