from sb3_deepcrl.zoo.launcher import main

main()
