module utaforge.test/pause

go 1.26

tool utaforge.test/pause
