//! Who may see what, and what is refused.

use aftercommit::console::{Access, Role, hash_password};
use sqlx::types::Uuid;

use super::browser::{Site, through_a_proxy};
use crate::support::{Directory, Outbox, Work};

/// What each route takes. A new route needs a line here.
const RIGHTS: [(&str, Option<Role>); 26] = [
    ("GET /", Some(Role::Viewer)),
    ("GET /api/v1/overview", Some(Role::Viewer)),
    ("GET /subscribers/{name}", Some(Role::Viewer)),
    ("GET /api/v1/subscribers/{name}", Some(Role::Viewer)),
    ("GET /events", Some(Role::Viewer)),
    ("GET /api/v1/events", Some(Role::Viewer)),
    ("GET /events/{id}", Some(Role::Viewer)),
    ("GET /api/v1/events/{id}", Some(Role::Viewer)),
    ("GET /dead", Some(Role::Viewer)),
    ("GET /api/v1/dead", Some(Role::Viewer)),
    ("GET /dead/{id}", Some(Role::Viewer)),
    ("GET /api/v1/dead/{id}", Some(Role::Viewer)),
    ("GET /parked", Some(Role::Viewer)),
    ("GET /api/v1/parked", Some(Role::Viewer)),
    ("GET /reconcile", Some(Role::Viewer)),
    ("GET /api/v1/reconcile", Some(Role::Viewer)),
    ("GET /jobs", Some(Role::Viewer)),
    ("GET /api/v1/jobs", Some(Role::Viewer)),
    ("GET /jobs/{id}", Some(Role::Viewer)),
    ("GET /api/v1/jobs/{id}", Some(Role::Viewer)),
    ("GET /audit", Some(Role::Viewer)),
    ("GET /api/v1/audit", Some(Role::Viewer)),
    ("GET /doctor", Some(Role::Viewer)),
    ("GET /api/v1/doctor", Some(Role::Viewer)),
    ("GET /live", Some(Role::Viewer)),
    ("GET /login", None),
];
const OF_EVERYBODY: [&str; 6] =
    ["POST /login", "POST /logout", "GET /healthz", "GET /assets/style", "GET /assets/console", "GET /assets/icon"];

async fn outbox() -> Outbox {
    Work::shared().await.outbox
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_in_the_table_and_lets_in_whom_it_says() {
    let site = Site::start(&outbox().await, through_a_proxy()).await;
    for (route, least) in &site.rights {
        let listed = RIGHTS.iter().find(|(known, _)| known == route);
        let open = OF_EVERYBODY.iter().any(|known| route.starts_with(known)) && least.is_none();
        assert!(open || listed.is_some_and(|(_, role)| role == least), "{route} takes {least:?}: say so in the table");
        let (method, path) = route.split_once(' ').unwrap();
        let id = if path.contains("/dead") { "1".into() } else { Uuid::now_v7().to_string() };
        let path = path.replace("{id}", &id).replace("{name}", "mails");
        if least.is_some() {
            let stranger = site.ask(method, &path, &[], "").await;
            assert_eq!(stranger.status, 401, "{route}: {}", stranger.body);
            let nobody =
                site.ask(method, &path, &[("x-forwarded-user", "jane"), ("x-forwarded-groups", "others")], "").await;
            assert_eq!(nobody.status, 401, "{route}");
            // What only looks is never changed by another method.
            for other in ["POST", "PUT", "DELETE", "PATCH"] {
                let headers =
                    [("x-forwarded-user", "jane"), ("x-forwarded-groups", "admin"), ("Sec-Fetch-Site", "same-origin")];
                assert_eq!(site.ask(other, &path, &headers, "").await.status, 405, "{other} {path}");
            }
        }
        if path == "/live" {
            continue;
        }
        for role in Role::ALL.into_iter().filter(|_| least.is_some()) {
            let answer = site.see(role, &path).await;
            assert_eq!(
                matches!(answer.status, 200 | 404),
                least.is_none_or(|least| role >= least),
                "{role:?} {route}: {answer:?}"
            );
        }
    }
    assert!(site.rights.len() >= RIGHTS.len() + OF_EVERYBODY.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_for_other_hosts_and_from_other_pages_are_refused() {
    let site = Site::start(&outbox().await, Access::Loopback).await;
    let port = site.address.port();
    for (host, status) in [
        (format!("127.0.0.1:{port}"), 200),
        (format!("localhost:{port}"), 200),
        (format!("rebound.example.com:{port}"), 421),
        ("127.0.0.1".into(), 421),
    ] {
        assert_eq!(site.ask("GET", "/parked", &[("Host", &host)], "").await.status, status, "{host}");
    }
    let origin = format!("http://127.0.0.1:{port}");
    for (headers, status) in [
        (vec![], 403),
        (vec![("Origin", "http://evil.example.com")], 403),
        (vec![("Origin", "null")], 403),
        (vec![("Sec-Fetch-Site", "cross-site"), ("Origin", origin.as_str())], 403),
        (vec![("Sec-Fetch-Site", "same-site")], 403),
        (vec![("Origin", origin.as_str())], 404),
        (vec![("Sec-Fetch-Site", "same-origin")], 404),
    ] {
        assert_eq!(site.ask("POST", "/login", &headers, "name=a&password=b").await.status, status, "{headers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_or_unknown_is_refused_by_name() {
    let site = Site::start(&outbox().await, Access::Loopback).await;
    let long = format!("/events?q={}", "x".repeat(9000));
    assert_eq!(site.ask("GET", &long, &[], "").await.status, 414);
    let (origin, body) = (format!("http://{}", site.address), format!("name={}", "x".repeat(20_000)));
    assert_eq!(site.ask("POST", "/login", &[("Origin", &origin)], &body).await.status, 413);
    for (path, named) in [
        ("/dead?q=subscribers:mails", "subscribers"),
        ("/dead?sort=id", "sort"),
        ("/events?before=x", "invalid digit"),
        ("/jobs?overdue=maybe", "overdue"),
        ("/audit?q=who:jane", "who"),
    ] {
        let answer = site.ask("GET", path, &[], "").await;
        assert_eq!(answer.status, 400, "{path}");
        assert!(answer.body.contains(named) || named == "overdue", "{path}: {}", answer.body);
    }
    assert_eq!(site.ask("GET", "/nowhere", &[], "").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn people_log_in_and_out_with_a_users_file() {
    let directory = Directory::new();
    let hash = hash_password("correct horse battery").unwrap();
    let users = directory.write("users.toml", format!("[[user]]\nname = 'jane'\nrole = 'viewer'\npassword = '{hash}'\n\n[[token]]\nname = 'cron'\nrole = 'viewer'\nsha256 = '9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08'\n"));
    let site = Site::with(&outbox().await, Access::Users(users), "/ops", Vec::new()).await;
    let origin = format!("http://{}", site.address);
    let from_page = [("Origin", origin.as_str())];

    let stranger = site.ask("GET", "/ops/dead?q=key:a", &[], "").await;
    assert_eq!(
        (stranger.status, stranger.header("location")),
        (303, Some("/ops/login?to=%2Fops%2Fdead%3Fq%3Dkey%3Aa"))
    );
    assert_eq!(site.ask("GET", "/ops/api/v1/dead", &[], "").await.status, 401);
    assert_eq!(site.ask("GET", "/ops/api/v1/dead", &[("Authorization", "Bearer test")], "").await.status, 200);
    assert_eq!(site.ask("GET", "/ops/api/v1/dead", &[("Authorization", "Bearer guess")], "").await.status, 401);

    let wrong = site.ask("POST", "/ops/login", &from_page, "name=jane&password=guess").await;
    assert_eq!((wrong.status, wrong.header("set-cookie")), (401, None));
    let right = "name=jane&password=correct+horse+battery&to=%2Fops%2Fdead%3Fq%3Dkey%3Aa";
    let entered = site.ask("POST", "/ops/login", &from_page, right).await;
    assert_eq!((entered.status, entered.header("location")), (303, Some("/ops/dead?q=key:a")));
    let cookie = entered.header("set-cookie").unwrap();
    for part in ["HttpOnly", "SameSite=Strict", "Path=/ops/"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    let session = cookie.split(';').next().unwrap().to_string();
    let inside = site.ask("GET", "/ops/dead", &[("Cookie", &session)], "").await;
    assert!(inside.status == 200 && inside.body.contains("jane · viewer"), "{inside:?}");

    for elsewhere in ["https://evil.example.com", "//evil.example.com", "/ops//evil", "/opsevil", "\\evil"] {
        let to: String = elsewhere.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let body = format!("name=jane&password=correct+horse+battery&to={to}");
        assert_eq!(
            site.ask("POST", "/ops/login", &from_page, &body).await.header("location"),
            Some("/ops/"),
            "{elsewhere}"
        );
    }
    site.ask("POST", "/ops/logout", &[("Origin", &origin), ("Cookie", &session)], "").await;
    assert_eq!(site.ask("GET", "/ops/dead", &[("Cookie", &session)], "").await.status, 303);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_says_what_a_browser_may_do_with_it() {
    let site = Site::start(&outbox().await, Access::Loopback).await;
    for path in ["/", "/dead", "/nowhere", "/api/v1/parked", "/healthz"] {
        let answer = site.ask("GET", path, &[], "").await;
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self'") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{path}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert!(
            !answer.body.contains(" style=") && !answer.body.contains("<script>") && !answer.body.contains(" onclick="),
            "{path}"
        );
    }
    let page = site.ask("GET", "/", &[], "").await.body;
    let style =
        page.split("href=\"").find(|part| part.starts_with("/assets/style")).unwrap().split('"').next().unwrap();
    let style = site.ask("GET", style, &[], "").await;
    assert!(style.status == 200 && style.header("cache-control").unwrap().contains("immutable"), "{}", style.head);
}
