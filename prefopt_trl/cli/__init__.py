from prefopt_trl.data.quiet import quiet_libraries

quiet_libraries()  # before a command imports them
