from prefopt_trl.runtime.quiet import quiet_libraries

quiet_libraries()  # before a command imports them
