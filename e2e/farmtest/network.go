package farmtest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
)

// Network is an office: a machine in a network namespace of its own, behind a router that hides it (NAT). From there
// this machine is reached by Host; from here nothing in it is.
type Network struct {
	Host string // this machine's address, as the office sees it

	office, router string // namespaces
	number         int
}

var (
	networksMu sync.Mutex
	networks   int // made so far, for names and addresses
)

// NewNetwork builds one, and takes it down with the test.
func NewNetwork(t T) *Network {
	t.Helper()
	networksMu.Lock()
	networks++
	n := &Network{number: networks}
	networksMu.Unlock()
	id := fmt.Sprintf("%d-%d", os.Getpid(), n.number)
	n.office, n.router = "farm-office-"+id, "farm-router-"+id
	// 198.18.0.0/15 is for tests between networks (RFC 2544).
	outside := fmt.Sprintf("198.18.%d.", n.number%250)
	n.Host = outside + "1"
	up, down := fmt.Sprintf("fu%d-%d", os.Getpid()%100000, n.number), fmt.Sprintf("fd%d-%d", os.Getpid()%100000, n.number)

	t.Cleanup(func() {
		for _, ns := range []string{n.office, n.router} { // with their interfaces, and so the other ends
			if out, err := exec.Command("ip", "netns", "delete", ns).CombinedOutput(); err != nil {
				t.Errorf("removing the network namespace %s: %v: %s", ns, err, out)
			}
		}
	})
	for _, command := range []string{
		"ip netns add " + n.office,
		"ip netns add " + n.router,
		"ip link add " + up + " type veth peer name wan netns " + n.router,
		"ip addr add " + n.Host + "/24 dev " + up,
		"ip link set " + up + " up",
		"ip -n " + n.router + " addr add " + outside + "2/24 dev wan",
		"ip -n " + n.router + " link set wan up",
		"ip link add " + down + " netns " + n.router + " type veth peer name lan netns " + n.office,
		"ip -n " + n.router + " link set " + down + " name lan",
		"ip -n " + n.router + " addr add 192.168.77.1/24 dev lan",
		"ip -n " + n.router + " link set lan up",
		"ip -n " + n.office + " addr add 192.168.77.2/24 dev lan",
		"ip -n " + n.office + " link set lan up",
		"ip -n " + n.office + " link set lo up",
		"ip -n " + n.office + " route add default via 192.168.77.1",
		"ip netns exec " + n.router + " sysctl -qw net.ipv4.ip_forward=1",
		"ip netns exec " + n.router + " nft add table ip nat",
		"ip netns exec " + n.router + " nft add chain ip nat out { type nat hook postrouting priority 100 ; }",
		"ip netns exec " + n.router + " nft add rule ip nat out oifname wan masquerade",
		"ip netns exec " + n.router + " nft add table ip filter",
		"ip netns exec " + n.router + " nft add chain ip filter forward { type filter hook forward priority 0 ; }",
	} {
		n.must(t, command)
	}
	return n
}

// Cut drops every packet between the office and the rest, silently, as a broken line does. Mend ends that.
func (n *Network) Cut(t T) {
	t.Helper()
	n.must(t, "ip netns exec "+n.router+" nft add rule ip filter forward drop")
}

// Mend lets packets pass again.
func (n *Network) Mend(t T) {
	t.Helper()
	n.must(t, "ip netns exec "+n.router+" nft flush chain ip filter forward")
}

// Readdress gives the office's machine another address: connections from the old one are dead, and nobody says so.
func (n *Network) Readdress(t T) {
	t.Helper()
	for _, command := range []string{
		"ip -n " + n.office + " addr flush dev lan",
		"ip -n " + n.office + " addr add 192.168.77.3/24 dev lan",
		"ip -n " + n.office + " route add default via 192.168.77.1",
	} {
		n.must(t, command)
	}
}

// Listening lists what listens in the office, as ss prints it.
func (n *Network) Listening(t T) string {
	t.Helper()
	out, err := exec.Command("ip", "netns", "exec", n.office, "ss", "-Hltnu").CombinedOutput()
	if err != nil {
		t.Fatalf("listing what listens behind the router: %v: %s", err, out)
	}
	return string(out)
}

// Free returns a port of Host that nobody listens on.
func (n *Network) Free(t T) string {
	t.Helper()
	return strings.Replace(freePort(t), "127.0.0.1", n.Host, 1)
}

// command is how to run a program there; on this machine for nil.
func (n *Network) command(path string, args []string) (string, []string) {
	if n == nil {
		return path, args
	}
	return "ip", append([]string{"netns", "exec", n.office, path}, args...)
}

func (n *Network) must(t T, command string) {
	t.Helper()
	words := strings.Fields(command)
	if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
}
