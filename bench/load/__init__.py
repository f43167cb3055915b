"""The load generators, open loop and closed loop, the traffic they offer, and the processes they load."""
