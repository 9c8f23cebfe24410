//! The twelve services: their tables, what is planted in them, and which rows belong to a tenant.

use aftercommit::erase::{Rows, Tables};

/// The kind of subject that is erased.
pub const TENANT: &str = "tenant";
/// The tenants; each has the same number of rows.
pub const TENANTS: i64 = 5;
/// The one that is deleted.
pub const DELETED: i64 = 3;

/// A service: its tables with rows of five tenants, and how it erases one of them.
pub struct Service {
    pub name: &'static str,
    /// Tables and rows.
    pub sql: &'static str,
    /// Each table, with a condition for the rows that have to go. It is what the example checks by, not what the service goes by.
    pub goes: &'static [(&'static str, &'static str)],
    /// What the service goes by.
    rows: fn() -> Vec<Rows>,
    /// How many rows a step deletes: few, so that there is something to kill. By default it is a thousand.
    chunk: u32,
}

impl Service {
    /// What the service erases, without a line of code.
    pub fn tables(&self, chunk: Option<u32>) -> Tables {
        Tables::new(self.name).of(TENANT, (self.rows)()).chunk(chunk.unwrap_or(self.chunk))
    }
}

/// The service with this name.
pub fn service(name: &str) -> Option<&'static Service> {
    ALL.iter().find(|service| service.name == name)
}

fn of_tenant(table: &str) -> Rows {
    Rows::of(table).column("tenant_id")
}

/// Twelve services.
pub const ALL: [Service; 12] = [
    Service {
        name: "orders",
        sql: "
            create table orders (id bigint primary key, tenant_id bigint not null);
            create index on orders (tenant_id);
            create table order_lines (id bigint primary key, order_id bigint not null references orders);
            create index on order_lines (order_id);
            create table line_adjustments (id bigint primary key, line_id bigint not null references order_lines);
            create index on line_adjustments (line_id);
            insert into orders select n, n % 5 + 1 from generate_series(1, 1000) n;
            insert into order_lines select n, n % 1000 + 1 from generate_series(1, 3000) n;
            insert into line_adjustments select n, n % 3000 + 1 from generate_series(1, 1500) n",
        goes: &[
            ("orders", "tenant_id = 3"),
            ("order_lines", "order_id in (select id from orders where tenant_id = 3)"),
            (
                "line_adjustments",
                "line_id in (select l.id from order_lines l join orders o on o.id = l.order_id where o.tenant_id = 3)",
            ),
        ],
        rows: || {
            vec![
                Rows::of("line_adjustments").parent("line_id", "order_lines"),
                Rows::of("order_lines").parent("order_id", "orders"),
                of_tenant("orders"),
            ]
        },
        chunk: 200,
    },
    Service {
        name: "inventory",
        sql: "
            create table stock_items (id bigint primary key, tenant_id bigint not null);
            create index on stock_items (tenant_id);
            create table stock_movements (id bigint primary key, item_id bigint not null references stock_items);
            create index on stock_movements (item_id);
            insert into stock_items select n, n % 5 + 1 from generate_series(1, 500) n;
            insert into stock_movements select n, n % 500 + 1 from generate_series(1, 2000) n",
        goes: &[
            ("stock_items", "tenant_id = 3"),
            ("stock_movements", "item_id in (select id from stock_items where tenant_id = 3)"),
        ],
        rows: || vec![Rows::of("stock_movements").parent("item_id", "stock_items"), of_tenant("stock_items")],
        chunk: 200,
    },
    Service {
        name: "recipes",
        // Templates of the system stay, with their ingredients, also those that were copied for a tenant.
        sql: "
            create table recipes (id bigint primary key, tenant_id bigint, is_system boolean not null);
            create index on recipes (tenant_id);
            create table ingredients (id bigint primary key, recipe_id bigint not null references recipes);
            create index on ingredients (recipe_id);
            insert into recipes select n, n % 5 + 1, n % 10 = 2 from generate_series(1, 400) n;
            insert into recipes select 400 + n, null, true from generate_series(1, 20) n;
            insert into ingredients select n, n % 420 + 1 from generate_series(1, 1680) n",
        goes: &[
            ("recipes", "tenant_id = 3 and not is_system"),
            ("ingredients", "recipe_id in (select id from recipes where tenant_id = 3 and not is_system)"),
        ],
        rows: || {
            vec![Rows::of("ingredients").parent("recipe_id", "recipes"), of_tenant("recipes").keep("is_system")]
        },
        chunk: 100,
    },
    Service {
        name: "sales",
        sql: "
            create table sales (id bigint primary key, tenant_id bigint not null);
            create index on sales (tenant_id);
            create table daily_totals (tenant_id bigint, day date, cents bigint not null, primary key (tenant_id, day));
            insert into sales select n, n % 5 + 1 from generate_series(1, 4000) n;
            insert into daily_totals select t, date '2026-01-01' + n, n from generate_series(1, 5) t, generate_series(1, 60) n",
        goes: &[("sales", "tenant_id = 3"), ("daily_totals", "tenant_id = 3")],
        rows: || vec![of_tenant("sales"), of_tenant("daily_totals")],
        chunk: 300,
    },
    Service {
        name: "production",
        sql: "
            create table batches (id bigint primary key, tenant_id bigint not null);
            create index on batches (tenant_id);
            create table batch_steps (batch_id bigint references batches, step int, primary key (batch_id, step));
            insert into batches select n, n % 5 + 1 from generate_series(1, 300) n;
            insert into batch_steps select n, s from generate_series(1, 300) n, generate_series(1, 4) s",
        goes: &[
            ("batches", "tenant_id = 3"),
            ("batch_steps", "batch_id in (select id from batches where tenant_id = 3)"),
        ],
        rows: || vec![Rows::of("batch_steps").parent("batch_id", "batches"), of_tenant("batches")],
        chunk: 100,
    },
    Service {
        name: "suppliers",
        sql: "
            create table suppliers (id bigint primary key, tenant_id bigint not null);
            create index on suppliers (tenant_id);
            create table purchase_orders (id bigint primary key, supplier_id bigint not null references suppliers);
            create index on purchase_orders (supplier_id);
            create table purchase_order_lines (id bigint primary key, purchase_id bigint not null references purchase_orders);
            create index on purchase_order_lines (purchase_id);
            insert into suppliers select n, n % 5 + 1 from generate_series(1, 100) n;
            insert into purchase_orders select n, n % 100 + 1 from generate_series(1, 800) n;
            insert into purchase_order_lines select n, n % 800 + 1 from generate_series(1, 2400) n",
        goes: &[
            ("suppliers", "tenant_id = 3"),
            ("purchase_orders", "supplier_id in (select id from suppliers where tenant_id = 3)"),
            (
                "purchase_order_lines",
                "purchase_id in (select p.id from purchase_orders p join suppliers s on s.id = p.supplier_id where s.tenant_id = 3)",
            ),
        ],
        rows: || {
            vec![
                Rows::of("purchase_order_lines").parent("purchase_id", "purchase_orders"),
                Rows::of("purchase_orders").parent("supplier_id", "suppliers"),
                of_tenant("suppliers"),
            ]
        },
        chunk: 100,
    },
    Service {
        name: "pos",
        // What goes by cascades is counted all the same.
        sql: "
            create table pos_sessions (id bigint primary key, tenant_id bigint not null);
            create index on pos_sessions (tenant_id);
            create table receipts (id bigint primary key, session_id bigint not null references pos_sessions on delete cascade);
            create index on receipts (session_id);
            create table receipt_items (id bigint primary key, receipt_id bigint not null references receipts on delete cascade);
            create index on receipt_items (receipt_id);
            insert into pos_sessions select n, n % 5 + 1 from generate_series(1, 500) n;
            insert into receipts select n, n % 500 + 1 from generate_series(1, 10000) n;
            insert into receipt_items select n, n % 10000 + 1 from generate_series(1, 30000) n",
        goes: &[
            ("pos_sessions", "tenant_id = 3"),
            ("receipts", "session_id in (select id from pos_sessions where tenant_id = 3)"),
            (
                "receipt_items",
                "receipt_id in (select r.id from receipts r join pos_sessions s on s.id = r.session_id where s.tenant_id = 3)",
            ),
        ],
        rows: || vec![of_tenant("pos_sessions")],
        chunk: 200,
    },
    Service {
        name: "external",
        // The weather of a city belongs to nobody.
        sql: "
            create table weather (city text, day date, celsius int, primary key (city, day));
            create table holidays (country text, day date, primary key (country, day));
            create table api_tokens (id bigint primary key, tenant_id bigint not null);
            create index on api_tokens (tenant_id);
            insert into weather select c, date '2026-01-01' + n, n % 30 from unnest(array['madrid', 'bilbao']) c, generate_series(1, 300) n;
            insert into holidays select 'es', date '2026-01-01' + n * 30 from generate_series(1, 12) n;
            insert into api_tokens select n, n % 5 + 1 from generate_series(1, 25) n",
        goes: &[("weather", "false"), ("holidays", "false"), ("api_tokens", "tenant_id = 3")],
        rows: || vec![of_tenant("api_tokens")],
        chunk: 100,
    },
    Service {
        name: "forecasting",
        sql: "
            create table forecasts (id bigint primary key, tenant_id bigint not null);
            create index on forecasts (tenant_id);
            create table forecast_points (forecast_id bigint references forecasts, n int, primary key (forecast_id, n));
            create table prediction_cache (tenant_id bigint, product text, primary key (tenant_id, product));
            insert into forecasts select n, n % 5 + 1 from generate_series(1, 200) n;
            insert into forecast_points select f, n from generate_series(1, 200) f, generate_series(1, 14) n;
            insert into prediction_cache select t, 'p' || n from generate_series(1, 5) t, generate_series(1, 50) n",
        goes: &[
            ("forecasts", "tenant_id = 3"),
            ("forecast_points", "forecast_id in (select id from forecasts where tenant_id = 3)"),
            ("prediction_cache", "tenant_id = 3"),
        ],
        rows: || {
            vec![
                Rows::of("forecast_points").parent("forecast_id", "forecasts"),
                of_tenant("forecasts"),
                of_tenant("prediction_cache"),
            ]
        },
        chunk: 200,
    },
    Service {
        name: "training",
        // Each artefact is a file, too.
        sql: "
            create table models (id bigint primary key, tenant_id bigint not null);
            create index on models (tenant_id);
            create table training_logs (id bigint primary key, model_id bigint not null references models);
            create index on training_logs (model_id);
            create table artefacts (path text primary key, tenant_id bigint not null);
            create index on artefacts (tenant_id);
            insert into models select n, n % 5 + 1 from generate_series(1, 50) n;
            insert into training_logs select n, n % 50 + 1 from generate_series(1, 500) n;
            insert into artefacts select format('tenant-%s/model-%s.bin', t, n), t from generate_series(1, 5) t, generate_series(1, 30) n",
        goes: &[
            ("models", "tenant_id = 3"),
            ("training_logs", "model_id in (select id from models where tenant_id = 3)"),
            ("artefacts", "tenant_id = 3"),
        ],
        rows: || vec![Rows::of("training_logs").parent("model_id", "models"), of_tenant("models")],
        chunk: 50,
    },
    Service {
        name: "alert_processor",
        sql: "
            create table alerts (id bigint primary key, tenant_id bigint not null);
            create index on alerts (tenant_id);
            create table alert_events (id bigint primary key, alert_id bigint not null references alerts);
            create index on alert_events (alert_id);
            insert into alerts select n, n % 5 + 1 from generate_series(1, 600) n;
            insert into alert_events select n, n % 600 + 1 from generate_series(1, 1200) n",
        goes: &[
            ("alerts", "tenant_id = 3"),
            ("alert_events", "alert_id in (select id from alerts where tenant_id = 3)"),
        ],
        rows: || vec![Rows::of("alert_events").parent("alert_id", "alerts"), of_tenant("alerts")],
        chunk: 100,
    },
    Service {
        name: "notification",
        // The table of push tokens is not there yet.
        sql: "
            create table notifications (id bigint primary key, tenant_id bigint not null, status text not null);
            create index on notifications (tenant_id);
            create table message_templates (id bigint primary key, tenant_id bigint, is_system boolean not null);
            create index on message_templates (tenant_id);
            insert into notifications select n, n % 5 + 1, case when n % 2 = 0 then 'sent' else 'pending' end from generate_series(1, 1000) n;
            insert into message_templates select n, n % 5 + 1, false from generate_series(1, 50) n;
            insert into message_templates select 50 + n, null, true from generate_series(1, 10) n",
        goes: &[("notifications", "tenant_id = 3"), ("message_templates", "tenant_id = 3 and not is_system")],
        rows: || {
            vec![
                of_tenant("notifications"),
                of_tenant("message_templates").keep("is_system"),
                of_tenant("push_tokens").optional(),
            ]
        },
        chunk: 100,
    },
];
